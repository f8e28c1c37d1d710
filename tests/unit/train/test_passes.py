"""One pass for everything, or one for the targets first: the same step."""

from __future__ import annotations

import pytest
import torch

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.train.passes import FusedPass, Passes
from tests.support.catalogue import make
from tests.support.recipes import LABELED, UNLABELED, global_batches


def batches(number: int, every_row_is_bad: bool) -> tuple[LabeledBatch, UnlabeledBatch]:
    labeled, unlabeled = global_batches(number)
    assert (len(labeled), len(unlabeled)) == (LABELED, UNLABELED)
    if every_row_is_bad:
        unlabeled = UnlabeledBatch(unlabeled.inputs, unlabeled.ids, torch.zeros(UNLABELED).bool())
    return labeled, unlabeled


@pytest.mark.parametrize("name", ["fixmatch", "comatch", "adamatch"])
def test_a_fused_pass_gives_the_same_step(name: str) -> None:
    curves = []
    for kind in (Passes, FusedPass):
        step = make(name, smooth=True)
        assert type(step._passes) is Passes
        step._passes = kind(step.engine, step.algorithm, step.teacher, step.rank_timer)
        # The third step has no valid row: what is reduced must be the same all the same.
        outcomes = [step(*batches(number, number == 2), measure=True) for number in range(4)]
        assert all(outcome.applied for outcome in outcomes)
        curves.append([outcome.metrics["loss"] for outcome in outcomes])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
