"""What is remembered of every row: by one rank only, and the same on any number of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist.algorithms import Algorithm, NoisyStudent, TemporalEnsembling
from hpdist.algorithms.parts import row_tables
from hpdist.algorithms.parts.row_tables import ShardedRows
from hpdist.algorithms.parts.tables import WholeShards
from hpdist.algorithms.protocol import join_shards
from hpdist.testing.imitation import global_batch, run_step

CLASSES, ROWS, RANKS = 5, 32, 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few ids in a row that every rank owns some of a small table."""
    monkeypatch.setattr(row_tables, "BLOCK", 4)


def made(kind: str, **options: Any) -> Algorithm:
    algorithm: Algorithm
    if kind == "temporal_ensembling":
        algorithm = TemporalEnsembling(CLASSES, unsupervised_weight=3.0, ramp_steps=2, **options)
        algorithm.rows = ROWS
        return algorithm
    algorithm = NoisyStudent(CLASSES, threshold=0.2, **options)
    algorithm.rows = ROWS
    return algorithm


def label(algorithm: Algorithm) -> None:
    if algorithm.generations > 1:
        ids = torch.arange(ROWS).flip(0)
        said = (ids[:, None] * (1 + torch.arange(CLASSES))).sin().mul(2).softmax(dim=1)
        algorithm.take_labels(ids, said)
        algorithm.begin_generation()


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("kind", ["temporal_ensembling", "noisy_student"])
@pytest.mark.usefixtures("small_blocks")
def test_ranks_share_the_table_and_lose_nothing(kind: str, top: int | None) -> None:
    """Equal losses, a share of the numbers on each rank, and one state, which others load."""
    one = made(kind, top=top)
    many = [made(kind, top=top) for _ in range(4)]
    for rank, algorithm in enumerate(many):
        algorithm.bind_rank(rank, 4)
    for algorithm in (one, *many):
        label(algorithm)
    for step in range(4):
        batch = global_batch(one, step, labeled=8, unlabeled=16, unusable=(3, 5))
        expected, found = run_step([one], batch), run_step(many, batch)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.losses["unsupervised_loss"] > 0 or step == 0
    whole = one.state_dict()
    held = [sum(len(p) for parts in m.shards().values() for _, p in parts) for m in many]
    total = sum(whole[name].numel() for name in many[0].shards())
    assert sum(held) == total
    assert max(held) == total // 4
    joined = join_shards(many[0].state_dict(), [m.shards() for m in many])
    for ranks in (1, 3):
        for rank in range(ranks):
            other = made(kind, top=top)
            other.bind_rank(rank, ranks)
            other.load_state_dict(joined)
            for name, parts in other.shards().items():
                for start, part in parts:
                    flat = whole[name].reshape(-1)[start : start + len(part)]
                    torch.testing.assert_close(part, flat.to(part), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_state_of_before_is_shared_out() -> None:
    """Whole tables, which every rank of an earlier run wrote down."""
    averages, counts = torch.rand(ROWS, CLASSES), torch.ones(ROWS)
    state = {"step": torch.tensor(7.0), "averages": averages, "counts": counts}
    for rank in range(RANKS):
        algorithm = TemporalEnsembling(CLASSES)
        algorithm.bind_rank(rank, RANKS)
        algorithm.load_state_dict(state, WholeShards({}))
        ids = torch.arange(ROWS)
        mine = (ids // 4) % RANKS == rank
        found = algorithm.averages.read(ids)
        assert torch.equal(found[mine], averages[mine])
        assert not found[~mine].any()
        assert len(algorithm.averages.parts[""]) < ROWS / 2
    with pytest.raises(KeyError, match="counts"):
        TemporalEnsembling(CLASSES).load_state_dict({k: state[k] for k in ("step", "averages")})
    with pytest.raises(KeyError, match="averages"):
        TemporalEnsembling(CLASSES, top=2).load_state_dict(state)


def test_the_largest_numbers_are_kept_in_fewer_bytes() -> None:
    whole = ShardedRows(1_000, torch.float32)
    few = ShardedRows(1_000, torch.float16, top=16)
    assert (whole.row_bytes, few.row_bytes) == (4_000, 16 * (2 + 2))
    said: Tensor = torch.randn(6, 1_000, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    ids = torch.tensor([5, 0, 3, 9, 2, 7])
    few.write(ids, said)
    found = few.read(torch.tensor([3, 4, 9]))
    assert not found[1].any()
    for row, kept in ((2, found[0]), (3, found[2])):
        best = said[row].topk(16).indices
        assert kept.nonzero()[:, 0].tolist() == sorted(best.tolist())
        torch.testing.assert_close(kept[best], said[row][best], rtol=1e-3, atol=0)
