"""Every algorithm in a real step on one process, whole and cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from hpdist.algorithms import AlgorithmConfig
from hpdist.algorithms.adamatch import AdaMatchConfig
from hpdist.algorithms.dash import DashConfig
from hpdist.algorithms.defixmatch import DeFixMatchConfig
from hpdist.algorithms.entropy_minimization import EntropyMinimizationConfig
from hpdist.algorithms.flexmatch import FlexMatchConfig
from hpdist.algorithms.pseudo_label import PseudoLabelConfig
from hpdist.algorithms.refixmatch import ReFixMatchConfig
from hpdist.algorithms.sequencematch import SequenceMatchConfig
from hpdist.algorithms.softmatch import SoftMatchConfig
from hpdist.algorithms.uda import UDAConfig
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from tests.support import lockstep
from tests.support.recipes import UNLABELED, global_batches, make_step

STEPS = 6
# Thresholds that cut in the first steps, where no confidence comes near 0.95.
CONFIGS: dict[str, AlgorithmConfig] = {
    "adamatch": AdaMatchConfig(threshold=0.97, momentum=0.9),
    "dash": DashConfig(warmup=0.3, decay_every=0.17, decay=1.01, min_threshold=1.0),
    "defixmatch": DeFixMatchConfig(threshold=0.15),
    "entropy_minimization": EntropyMinimizationConfig(),
    "flexmatch": FlexMatchConfig(threshold=0.15, warmup=False, unsupervised_weight=0.2),
    "pseudo_label": PseudoLabelConfig(threshold=0.15),
    "refixmatch": ReFixMatchConfig(threshold=0.15),
    "sequencematch": SequenceMatchConfig(threshold=0.15, warmup=False, unsupervised_weight=0.2),
    "softmatch": SoftMatchConfig(momentum=0.5),
    "uda": UDAConfig(threshold=0.15),
    "uda tsa": UDAConfig(threshold=0.15, annealing="linear"),
}


def batches(number: int) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Some rows cannot be used, and in one step none."""
    labeled, unlabeled = global_batches(number)
    valid = (torch.arange(UNLABELED) + number) % 5 > 0
    if number == 3:
        valid[:] = False
    return labeled, UnlabeledBatch(unlabeled.inputs, unlabeled.ids, valid)


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulation_does_not_matter(name: str) -> None:
    whole, cut = (
        make_step(CONFIGS[name].build(10, steps=STEPS), micro_batches=parts, smooth=True)
        for parts in (1, 2)
    )
    run = lockstep.record(whole, range(STEPS), batches)
    assert lockstep.follow(cut, run, batches) == {}
    assert len({record["loss"] for record in run.curve}) == STEPS
    assert run.curve[3]["unsupervised_loss"] == 0
    assert any(step.metrics["unsupervised_loss"] != 0 for step in run.firm.values())
    if "mask_rate" in run.curve[0]:
        rates = [step.metrics["mask_rate"] for step in run.firm.values()]
        assert any(0 < rate < 1 for rate in rates), rates


def test_a_small_batch_says_nothing_of_collapse() -> None:
    """Of one row, one class always takes all."""
    step = make_step("fixmatch")
    labeled, unlabeled = global_batches(0)
    for rows in (1, 2, 48):
        metrics = step(labeled, unlabeled.narrow(0, rows), measure=True).metrics
        assert ("pseudo_label_top_share" in metrics) == (rows > 1)
