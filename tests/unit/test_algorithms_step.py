"""Every algorithm in a real step on one process, whole and cut into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpdist.algorithms import Algorithm, AlgorithmConfig
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
from hpdist.data.batch import UnlabeledBatch
from tests.recipes import UNLABELED, global_batches, make_step

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


def curve(config: AlgorithmConfig, micro_batches: int) -> tuple[list[dict[str, float]], Algorithm]:
    algorithm = config.build(10, steps=STEPS)
    step = make_step(algorithm, micro_batches=micro_batches, lr=0.01)
    found: list[dict[str, Any]] = []
    for number in range(STEPS):
        labeled, unlabeled = global_batches(number)
        valid = (torch.arange(UNLABELED) + number) % 5 > 0
        if number == 3:
            valid[:] = False  # a step without a row that can be used
        unlabeled = UnlabeledBatch(unlabeled.inputs, unlabeled.ids, valid)
        outcome = step(labeled, unlabeled, measure=True)
        assert outcome.applied
        found.append(dict(outcome.metrics) | {"grad_norm": outcome.grad_norm or 0.0})
    return found, algorithm


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulation_does_not_matter(name: str) -> None:
    one, whole = curve(CONFIGS[name], 1)
    other, cut = curve(CONFIGS[name], 2)
    assert len({record["loss"] for record in one}) == STEPS
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-4, abs=2e-6), f"{key} at step {number}"
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    assert one[3]["unsupervised_loss"] == 0
    assert one[-1]["unsupervised_loss"] != 0
    if "mask_rate" in one[0]:
        rates = [record["mask_rate"] for record in one]
        assert any(0 < rate < 1 for rate in rates), rates


def test_a_small_batch_says_nothing_of_collapse() -> None:
    """Of one row, one class always takes all."""
    step = make_step("fixmatch")
    labeled, unlabeled = global_batches(0)
    for rows in (1, 2, 48):
        metrics = step(labeled, unlabeled.narrow(0, rows), measure=True).metrics
        assert ("pseudo_label_top_share" in metrics) == (rows > 1)
