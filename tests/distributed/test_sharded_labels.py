"""FlexMatch's labels on 1, 2 and 3 real ranks: a part on each, the same counts in every step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist.algorithms import FlexMatch
from hpdist.algorithms.parts import tables
from hpdist.checkpoint.reader import SavedRun
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.samples.digits import write_digits
from hpdist.engines.config import LossScale
from hpdist.train.algorithm_state import whole_state
from tests.support.ranks import run_ranks
from tests.support.recipes import digits, make_step, slice_of
from tests.support.run_records import records

CLASSES, STEPS = 10, 12
SKIPPED = (0, 3, 4, 9)  # by an overflow on one rank
EMPTY = 6  # a step without a row that can be used
ROWS = 10_000  # expected; the ids go up to 28 thousand
Told = dict[str, Any]


def batches(number: int) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Of 60 rows, some twice in a batch, with ids of seven blocks."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(len(images), (12,), generator=generator)
    u = torch.randint(60, (48,), generator=generator)
    ids = u % 7 * tables.BLOCK + u
    valid = torch.full_like(u, number != EMPTY).bool()
    return LabeledBatch(images[x], labels[x], x), UnlabeledBatch(images[u], ids, valid)


def counted(algorithm: FlexMatch) -> Told:
    """What the counts are, and every label, of all ranks. Collective."""
    alone = FlexMatch(CLASSES)
    alone.load_state_dict(whole_state(algorithm))
    state = alone.state_dict()
    labels = state.pop("labels")
    known = (labels != tables.UNSEEN).nonzero().flatten()
    by_id = dict(zip(known.tolist(), labels[known].tolist(), strict=True))
    return {"labels": by_id} | {name: value.tolist() for name, value in state.items()}


def own_state(algorithm: FlexMatch) -> list[Tensor]:
    parts = [part.clone() for parts in algorithm.shards().values() for _, part in parts]
    return [*parts, *(value.clone() for value in algorithm.state_dict().values())]


def steps(micro_batches: int) -> list[Told]:
    """Weights that stay as they are, so that no rounding makes another label."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    algorithm = FlexMatch(CLASSES, threshold=0.15, rows=ROWS)
    scale = LossScale(initial=2.0**10)
    step = make_step(
        algorithm, precision="fp16", micro_batches=micro_batches, loss_scale=scale, lr=0.0
    )
    algorithm.warmup = False
    engine = step.engine
    overflows = [False]

    def overflow(module: Any, arguments: Any, output: Tensor) -> Tensor:
        last = engine.rank == engine.world_size - 1
        return output * 6e4 * 6e4 if last and overflows[0] and output.requires_grad else output

    engine.module.classifier.register_forward_hook(overflow)
    found = []
    for number in range(STEPS):
        overflows[0] = number in SKIPPED
        cut = [slice_of(batch, engine.rank, engine.world_size) for batch in batches(number)]
        before = own_state(algorithm)
        outcome = step(*cut, measure=True)
        same = all(torch.equal(a, b) for a, b in zip(before, own_state(algorithm), strict=False))
        assert outcome.applied == (number not in SKIPPED)
        assert same or outcome.applied, "a skipped step changes nothing"
        told = counted(algorithm) | {"thresholds": outcome.per_class["thresholds"]}
        if outcome.applied:
            told |= {key: outcome.metrics[key] for key in ("mask_rate", "unsupervised_loss")}
        found.append(told)
    return found


@pytest.fixture(scope="module")
def reference() -> list[Told]:
    return run_ranks(1, steps, 1)[0]


def test_the_reference_moves(reference: list[Told]) -> None:
    rates = [told["mask_rate"] for told in reference if "mask_rate" in told]
    assert min(rates) == 0
    assert len(set(rates)) > 4
    assert reference[-1]["seen"] == len(reference[-1]["labels"]) > 50
    assert max(reference[-1]["labels"]) > 2 * ROWS
    labels = list(reference[-1]["labels"].values())
    assert reference[-1]["counts"] == [labels.count(label) for label in range(CLASSES)]


@pytest.mark.parametrize(
    ("ranks", "micro_batches"), [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2), (3, 2)]
)
def test_counts_and_thresholds_of_every_step(
    reference: list[Told], ranks: int, micro_batches: int
) -> None:
    for found in run_ranks(ranks, steps, micro_batches):
        for number, (told, wanted) in enumerate(zip(found, reference, strict=True)):
            for key in ("labels", "counts", "seen", "thresholds"):
                assert told[key] == wanted[key], (number, key)
            for key in ("mask_rate", "unsupervised_loss"):
                assert told.get(key, 0) == pytest.approx(wanted.get(key, 0), rel=1e-2), (
                    number,
                    key,
                )


def held() -> tuple[int, int, list[int]]:
    algorithm = FlexMatch(CLASSES, threshold=0.15, rows=200_000)
    step = make_step(algorithm)
    rank, ranks = step.engine.rank, step.engine.world_size
    step(*[slice_of(batch, rank, ranks) for batch in batches(1)])
    tensors = [value for value in vars(algorithm._table).values() if isinstance(value, Tensor)]
    labels = algorithm.shards()["labels"]
    bytes_held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return rank, bytes_held, [at // tables.BLOCK for at, _ in labels]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_its_part_alone(ranks: int) -> None:
    blocks = []
    for rank, size, own in run_ranks(ranks, held):
        assert abs(size - 2 * 200_000 / ranks) < 2 * tables.BLOCK + 200
        assert all(block % ranks == rank for block in own)
        blocks += own
    assert sorted(blocks) == list(range(-(-200_000 // tables.BLOCK)))


def train(data: Path, runs: Path, name: str, until: int, dies_at: int = 0) -> None:
    """Train on this rank; rank 1 is killed in the step that it dies at."""
    from hpdist.train.trainer import Trainer

    tables.BLOCK = 100  # so that some 1,500 rows are dealt out
    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    trainer = Trainer(
        {"name": "cnn", "width": 4},
        {"name": "flexmatch", "threshold": 0.16, "warmup": False},
        labeled=files | {"labels_per_class": 4},
        unlabeled=files,
        batch={"labeled": 12, "unlabeled": 24},
        views={"weak": {"flip": False}},
        steps=until,
        schedule={"name": "constant"},
        optim={"name": "sgd", "lr": 0.02},
        precision="fp32",
        run={"dir": str(runs), "name": name},
        log={"every": 1},
        checkpoint={"every": 4},
        tracker={"name": "none"},
    )
    commit = trainer.step.algorithm.commit

    def commit_or_die() -> None:
        if trainer.step.applied_steps == dies_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        commit()

    trainer.step.algorithm.commit = commit_or_die  # type: ignore[method-assign]
    trainer.fit()


def saved_counts(run: Path) -> tuple[list[int], dict[int, int]]:
    """Counts and labels of the last checkpoint, as one rank would load them."""
    saved = SavedRun(run / "checkpoints/step-00000016")
    alone = FlexMatch(CLASSES)
    state = {n.partition("/")[2]: v for n, v in saved.common.items() if n.startswith("algorithm/")}
    alone.load_state_dict(state, saved.whole("algorithm"))
    labels = alone.state_dict()["labels"].tolist()
    return alone.state["counts"].tolist(), {i: v for i, v in enumerate(labels) if v >= 0}


@pytest.mark.slow
def test_killed_on_two_ranks_it_goes_on_with_three_and_then_one(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run_ranks(1, train, data, tmp_path, "whole", 16)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(2, train, data, tmp_path, "moved", 16, 7)
    assert not (tmp_path / "moved/checkpoints/step-00000008").exists()
    run_ranks(3, train, data, tmp_path, "moved", 8)
    run_ranks(1, train, data, tmp_path, "moved", 12)
    run_ranks(2, train, data, tmp_path, "moved", 16)
    counts, labels = saved_counts(tmp_path / "whole")
    assert (counts, labels) == saved_counts(tmp_path / "moved")
    assert counts == [list(labels.values()).count(label) for label in range(CLASSES)]
    assert sum(counts) > 50
    pairs = zip(records(tmp_path / "whole"), records(tmp_path / "moved"), strict=True)
    for one, other in pairs:
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
