"""DARP and CReST hold a share of their tables on each rank, and are what they are on one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpdist.algorithms import DARP, Algorithm, CReST, FixMatch, TemporalEnsembling
from hpdist.algorithms.parts import class_sums, row_tables
from hpdist.algorithms.parts.selection import Entries, select_largest
from hpdist.algorithms.parts.tables import WholeShards
from hpdist.algorithms.protocol import join_shards
from hpdist.errors import ConfigError
from hpdist.testing.imitation import global_batch, on_ranks, run_step

CLASSES, ROWS = 5, 32
COUNTS = torch.tensor([40.0, 20.0, 10.0, 5.0, 2.0])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few ids in a row that every rank owns some of a small table."""
    monkeypatch.setattr(row_tables, "BLOCK", 4)


def darp(inside: Algorithm | None = None, top: int | None = None) -> DARP:
    inside = inside or FixMatch(threshold=0.3)
    algorithm = DARP(inside, CLASSES, warmup_steps=1, every=2, iterations=3, alpha=1.2, top=top)
    algorithm.rows, algorithm.class_counts = ROWS, COUNTS
    return algorithm


def crest() -> CReST:
    algorithm = CReST(FixMatch(threshold=0.3), CLASSES, generations=3, alpha=2.0, window=2)
    algorithm.rows, algorithm.class_counts = ROWS, COUNTS
    return algorithm


def bound(made: Sequence[Algorithm]) -> list[Algorithm]:
    for rank, algorithm in enumerate(made):
        algorithm.bind_rank(rank, len(made))
    return list(made)


def joined(many: Sequence[Algorithm]) -> dict[str, Tensor]:
    return join_shards(many[0].state_dict(), [algorithm.shards() for algorithm in many])


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].view(value.shape), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("held", [0, 1 << 20])  # logs are calculated again, or kept
def test_darp_on_ranks_is_darp_on_one(
    top: int | None, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around an algorithm with a table of its own, and while the number of ranks changes."""
    monkeypatch.setattr(class_sums, "_HELD", held)

    def made() -> DARP:
        return darp(TemporalEnsembling(CLASSES, unsupervised_weight=3.0), top)

    one, many = made(), bound([made() for _ in range(4)])
    refined = 0
    for step, ranks in enumerate([4, 4, 2, 4, 2, 2]):
        batch = global_batch(
            one, step, labeled=8, unlabeled=16, unusable=(3, 5) if step % 2 else ()
        )
        if ranks != len(many):
            state, many = joined(many), bound([made() for _ in range(ranks)])
            for algorithm in many:
                algorithm.load_state_dict(
                    {k: v for k, v in state.items() if k in algorithm.state_dict()},
                    WholeShards(state),
                )
        expected, found = run_step([one], batch), run_step(many, batch)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        refined += expected.losses["refined_rate"] > 0
        check_same(joined(many), one.state_dict())
    assert refined >= 3
    own = [sum(p.numel() for p in a.predictions.parts.values()) for a in many]  # type: ignore[attr-defined]
    assert sum(own) == sum(p.numel() for p in one.predictions.parts.values())
    assert max(own) <= sum(own) / 2


def test_crest_on_ranks_chooses_the_rows_of_one() -> None:
    """Exactly, with many predictions that are equally sure; rows are found on any rank."""
    one, many = crest(), bound([crest() for _ in range(4)])
    noise = torch.Generator().manual_seed(0)
    for generation in range(2):
        ids = torch.randperm(ROWS, generator=noise)
        said = torch.randint(1, 4, (ROWS, CLASSES), generator=noise).float()
        said = said / said.sum(dim=1, keepdim=True)
        for algorithm in (one, *many):
            for rows, values in zip(ids.split(7), said.split(7), strict=True):
                algorithm.take_labels(rows, values)
        one.begin_generation()
        on_ranks(many, lambda rank, _: many[rank].begin_generation())
        state = one.state_dict()["crest.chosen"]
        assert torch.equal(joined(many)["crest.chosen"].view(-1, 1), state)
        assert 0 < int((state > 0).sum()) < ROWS
        for step in range(2):
            batch = global_batch(one, 9 * generation + step, labeled=8, unlabeled=16, unusable=(3,))
            expected, found = run_step([one], batch), run_step(many, batch)
            assert expected.losses["joined_rate"] > 0
            assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    check_same(joined(many), one.state_dict())


VALUES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.25000003, 0.7, 1.0]), st.integers(0, 2)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_the_selection_is_that_of_a_stable_sort(
    entries: list[tuple[float, int]], wanted: list[int]
) -> None:
    values = torch.tensor([value for value, _ in entries], dtype=torch.float32)
    classes = torch.tensor([label for _, label in entries], dtype=torch.int64)
    ids = torch.arange(len(entries)) * 3
    shuffled = torch.tensor(np.random.default_rng(len(entries)).permutation(len(entries))).long()
    mixed = Entries(values[shuffled], ids[shuffled], classes[shuffled])
    selection = select_largest(
        lambda which: mixed.count(which(mixed), 3),
        torch.tensor(wanted),
        3 * len(entries) + 1,
        torch.float32,
    )
    found = mixed.ids[selection.of(mixed)].sort().values
    expected: list[Tensor] = []
    for label in range(3):
        rows = (classes == label).nonzero()[:, 0]
        best = values[rows].argsort(descending=True, stable=True)[: wanted[label]]
        expected.append(ids[rows[best]])
    assert found.tolist() == torch.cat(expected).sort().values.tolist()


def test_all_of_the_largest_are_all() -> None:
    """With `top` as many as there are classes, nothing is left out."""
    whole, top = darp(), darp(top=CLASSES)
    for step in range(4):
        batch = global_batch(whole, step, labeled=8, unlabeled=16)
        assert run_step([top], batch).losses == run_step([whole], batch).losses
    few = darp(top=2)
    assert few.remembered_bytes(100) == 100 * 2 * 2 * (4 + 2)
    assert few.remembered_bytes(100) < whole.remembered_bytes(100)


def test_state_of_before_is_taken_over() -> None:
    """Every rank held all rows then; a column of labels is [rows, 1] as it was."""
    state = crest().state_dict() | {"crest.chosen": torch.randint(0, 3, (40, 1)).short()}
    many = bound([crest() for _ in range(2)])
    for algorithm in many:
        algorithm.load_state_dict(state)
    assert torch.equal(joined(many)["crest.chosen"].view(-1, 1), state["crest.chosen"])
    tables = torch.rand(2, 40, CLASSES).softmax(dim=2)
    state = darp().state_dict() | {"darp.predictions": tables[0], "darp.refined": tables[1]}
    two = bound([darp() for _ in range(2)])
    for algorithm in two:
        algorithm.load_state_dict(state)
    assert torch.equal(joined(two)["darp.refined"].view(40, CLASSES), tables[1])


def test_ranks_that_cannot_reduce_are_refused() -> None:
    first, _ = bound([crest(), crest()])
    first.take_labels(torch.arange(ROWS), torch.rand(ROWS, CLASSES).softmax(dim=1))
    with pytest.raises(ConfigError, match=r"rows of one of 2 ranks.*algorithm\.over_ranks"):
        first.begin_generation()
