"""Rows that are not valid count for nothing, wherever in the global batch and on whichever rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.algorithms import FreeMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig
from hpdist.train.step import SemiSupervisedStep
from tests.support import lockstep
from tests.support.lockstep import Recorded
from tests.support.ranks import run_ranks
from tests.support.recipes import UNLABELED, global_batches, make_step, slice_of

POINTS = (0, 1, 3)
SHAPES = [("fixmatch", "group", 1), ("fixmatch", "group", 2), ("fixmatch", "batch", 1)]
SHAPES += [("freematch", "group", 1), ("freematch", "batch", 1), ("mean_teacher", "group", 1)]
Runs = dict[tuple[str, str], Recorded]
Found = dict[tuple[str, str, int], dict[int, list[str]]]  # what differs, by step


def masked(batch: UnlabeledBatch, step: int) -> UnlabeledBatch:
    """Without its first quarter, which is all that a rank of four has, and a third of the rest."""
    places = torch.arange(UNLABELED)
    valid = (places >= UNLABELED // 4) & ((places + step) % 3 > 0)
    noise = torch.randint(256, batch.inputs.shape, dtype=torch.uint8)
    inputs = torch.where(valid[:, None, None, None], batch.inputs, noise)
    return UnlabeledBatch(inputs, batch.ids, valid)


def with_masked(number: int) -> tuple[LabeledBatch, UnlabeledBatch]:
    labeled, unlabeled = global_batches(number)
    return labeled, masked(unlabeled, number)


def without(number: int) -> tuple[LabeledBatch, UnlabeledBatch]:
    """A global batch that never had the masked rows."""
    labeled, unlabeled = with_masked(number)
    valid = unlabeled.valid
    assert valid is not None
    return labeled, UnlabeledBatch(unlabeled.inputs[valid], unlabeled.ids[valid])


def make(algorithm: str, norm: str, micro_batches: int, accelerator: Any) -> SemiSupervisedStep:
    step = make_step(
        # One whose thresholds follow its confidence at once, so that they cut.
        FreeMatch(10, momentum=0.3, fairness_weight=0.05)
        if algorithm == "freematch"
        else algorithm,
        norm=norm,
        micro_batches=micro_batches,
        smooth=True,
        accelerator=accelerator,
    )
    step.views = IdentityViewsConfig().build(0)  # so that a row's place does not matter
    return step


def record_and_follow(file: Path) -> tuple[Runs, Found]:
    found: Runs = {}
    accelerator = None
    for algorithm, norm, _ in SHAPES:
        if (algorithm, norm) not in found:
            step = make(algorithm, norm, 1, accelerator)
            accelerator = step.engine.accelerator
            found[algorithm, norm] = lockstep.record(step, POINTS, without)
    torch.save(found, file)
    return found, follow(file)


def follow(file: Path) -> Found:
    recorded, found = torch.load(file, weights_only=False), {}
    accelerator = None
    for algorithm, norm, micro_batches in SHAPES:
        step = make(algorithm, norm, micro_batches, accelerator)
        accelerator = step.engine.accelerator
        found[algorithm, norm, micro_batches] = lockstep.follow(
            step, recorded[algorithm, norm], with_masked
        )
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded") / "runs.pt"


@pytest.fixture(scope="module")
def on_one(file: Path) -> tuple[Runs, Found]:
    return run_ranks(1, record_and_follow, file)[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_masked_row_is_as_if_it_were_not_there(
    file: Path, on_one: tuple[Runs, Found], ranks: int
) -> None:
    for found in [on_one[1]] if ranks == 1 else run_ranks(ranks, follow, file):
        assert {shape: told for shape, told in found.items() if told} == {}


def test_some_rows_pass_and_some_do_not(on_one: tuple[Runs, Found]) -> None:
    for (algorithm, _), run in on_one[0].items():
        rates = [step.metrics.get("mask_rate", 0.5) for step in run.firm.values()]
        assert any(0 < rate < 1 for rate in rates), (algorithm, rates)


def no_valid_row() -> tuple[dict[str, float], bool, bool]:
    step = make_step("freematch", norm="batch")
    labeled, unlabeled = global_batches(0)
    step(*[slice_of(b, step.engine.rank, step.engine.world_size) for b in (labeled, unlabeled)])
    before = {name: value.clone() for name, value in step.algorithm.state_dict().items()}
    nothing = UnlabeledBatch(unlabeled.inputs, unlabeled.ids, torch.zeros(UNLABELED).bool())
    batches = [slice_of(b, step.engine.rank, step.engine.world_size) for b in (labeled, nothing)]
    outcome = step(*batches, measure=True)
    same = all(torch.equal(before[n], v) for n, v in step.algorithm.state_dict().items())
    return dict(outcome.metrics), outcome.applied, same


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_without_a_valid_row_still_learns_from_the_labels(ranks: int) -> None:
    metrics, applied, statistics_kept = run_ranks(ranks, no_valid_row)[0]
    assert applied
    assert statistics_kept
    assert metrics["supervised_loss"] > 0
    assert metrics["unsupervised_loss"] == 0
