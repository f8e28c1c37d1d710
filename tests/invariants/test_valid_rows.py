"""Rows that are not valid count for nothing, wherever in the global batch and on whichever rank."""

from __future__ import annotations

import pytest
import torch

from hpdist.algorithms import FixMatch
from hpdist.data.batch import UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig
from tests.ranks import run_ranks
from tests.recipes import UNLABELED, global_batches, make_step, slice_of

STEPS = 4
SHAPES = [("fixmatch", "group", 1), ("fixmatch", "group", 2), ("fixmatch", "batch", 1)]
SHAPES += [("freematch", "group", 1), ("freematch", "batch", 1), ("mean_teacher", "group", 1)]
Curves = dict[tuple[str, str, int], list[dict[str, float]]]


def masked(batch: UnlabeledBatch, step: int) -> UnlabeledBatch:
    """Without its first quarter, which is all that a rank of four has, and a third of the rest."""
    places = torch.arange(UNLABELED)
    valid = (places >= UNLABELED // 4) & ((places + step) % 3 > 0)
    noise = torch.randint(256, batch.inputs.shape, dtype=torch.uint8)
    inputs = torch.where(valid[:, None, None, None], batch.inputs, noise)
    return UnlabeledBatch(inputs, batch.ids, valid)


def curves(remove: bool) -> Curves:
    """With the rows masked, or with a global batch that never had them."""
    found: Curves = {}
    accelerator = None
    for algorithm, norm, micro_batches in SHAPES:
        step = make_step(
            FixMatch(0.15) if algorithm == "fixmatch" else algorithm,
            norm=norm,
            micro_batches=1 if remove else micro_batches,
            accelerator=accelerator,
            lr=0.002,
        )
        accelerator = step.engine.accelerator
        step.views = IdentityViewsConfig().build(0)  # so that a row's place does not matter
        curve = []
        for number in range(STEPS):
            labeled, unlabeled = global_batches(number)
            unlabeled = masked(unlabeled, number)
            if remove:
                assert unlabeled.valid is not None
                unlabeled = UnlabeledBatch(
                    unlabeled.inputs[unlabeled.valid], unlabeled.ids[unlabeled.valid]
                )
            rank, ranks = step.engine.rank, step.engine.world_size
            batches = [slice_of(batch, rank, ranks) for batch in (labeled, unlabeled)]
            outcome = step(*batches, measure=True)
            curve.append(dict(outcome.metrics) | {"grad_norm": outcome.grad_norm or 0.0})
        state = step.algorithm.state_dict().values()
        curve.append({"state": sum(float(value.float().sum()) for value in state)})
        buffers = step.engine.module.buffers()
        curve.append({"buffers": sum(float(b.float().square().sum()) for b in buffers)})
        found[algorithm, norm, micro_batches] = curve
    return found


@pytest.fixture(scope="module")
def reference() -> Curves:
    return run_ranks(1, curves, True)[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_masked_row_is_as_if_it_were_not_there(reference: Curves, ranks: int) -> None:
    found = run_ranks(ranks, curves, False)[0]
    for shape, expected in reference.items():
        for step, (values, wanted) in enumerate(zip(found[shape], expected, strict=True)):
            assert values == pytest.approx(wanted, rel=2e-4, abs=1e-6), (shape, step)


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
