"""Learning from stored labels against a float64 reference of its formula."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

import hpdist
from hpdist.algorithms import AlgorithmConfig, StoredPseudoLabels
from hpdist.config.component import components
from hpdist.data.batch import STORED, UnlabeledBatch
from hpdist.errors import ConfigError
from hpdist.testing import check_algorithm
from tests.support.algorithm_runs import cross_entropy, global_batch, run, squared_error
from tests.support.recipes import global_batches, make_step

CLASSES = 5
CHANGES: list[dict[str, Any]] = [
    {"threshold": 0.6},
    {"agreement": 0.6},
    {"soft": False},
    {"temperature": 0.5},
    {"distance": "mse"},
    {"unsupervised_weight": 3.0},
]


def reference(
    stored: dict[str, np.ndarray], logits: np.ndarray, **options: Any
) -> tuple[float, np.ndarray, np.ndarray]:
    """The unsupervised loss, its gradient to the strong view's logits, and which rows count."""
    q, confidence, agreement = (
        stored[STORED + name] for name in ("probabilities", "confidence", "agreement")
    )
    mask = (agreement > 0) & (confidence >= options.get("threshold", 0))
    mask &= agreement >= options.get("agreement", 0)
    powers = q ** (1 / options.get("temperature", 1))
    targets = powers / np.maximum(powers.sum(axis=1, keepdims=True), 1e-300)
    if not options.get("soft", True):
        targets = np.eye(CLASSES)[q.argmax(axis=1)]
    formula = squared_error if options.get("distance") == "mse" else cross_entropy
    losses, slopes = formula(logits, targets)
    count = len(mask)
    return (losses * mask).sum() / count, slopes * mask[:, None] / count, mask


@pytest.mark.parametrize("options", [{}, *CHANGES, {"threshold": 0.5, "temperature": 2.0}])
def test_formula(options: dict[str, Any]) -> None:
    algorithm = StoredPseudoLabels(CLASSES, **options)
    for step in range(3):
        batch = global_batch(algorithm, step)
        ran = run(algorithm, batch)
        stored = {name: kept.double().numpy() for name, kept in batch.stored.items()}
        expected, slopes, mask = reference(stored, ran.arrays("logits")[1], **options)
        assert 0 < mask.sum() < len(mask)
        assert ran.losses["unsupervised_loss"] == pytest.approx(expected, rel=1e-5)
        assert ran.losses["mask_rate"] == pytest.approx(mask.mean())
        weight = options.get("unsupervised_weight", 1.0)
        np.testing.assert_allclose(
            ran.arrays("gradients")[1], weight * slopes, rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("options", [{}, *CHANGES])
def test_contract(options: dict[str, Any]) -> None:
    config = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    check_algorithm(config["stored_pseudo_labels"](name="stored_pseudo_labels", **options))


def test_a_row_without_a_label_adds_nothing() -> None:
    algorithm = StoredPseudoLabels(CLASSES)
    batch = global_batch(algorithm)
    ran = run(algorithm, batch)
    empty = batch.stored[STORED + "agreement"] == 0
    assert 0 < empty.sum() < len(empty)
    assert not ran.gradients[1][empty].any()
    assert ran.gradients[1][~empty].any(dim=1).all()


def test_a_batch_without_stored_labels_is_refused() -> None:
    step = make_step(StoredPseudoLabels(10))
    labeled, unlabeled = global_batches(0)
    with pytest.raises(ConfigError, match=r"data\.unlabeled\.pseudo_labels"):
        step(labeled, hpdist.UnlabeledBatch(unlabeled.inputs, unlabeled.ids))
    assert step(labeled, unlabeled, measure=True).metrics["unsupervised_loss"] > 0


def test_batches_keep_rows_and_stored_labels_together() -> None:
    _, batch = global_batches(0)
    valid = torch.arange(len(batch)) % 3 != 1
    batch = UnlabeledBatch(batch.inputs, batch.ids, valid, stored=batch.stored)
    part, _ = batch.narrow(5, 20).to("cpu").only_valid()
    assert batch.stored is not None
    assert part.stored is not None
    kept = batch.stored["probabilities"][5:25][valid[5:25]]
    assert torch.equal(part.stored["probabilities"], kept)
    assert torch.equal(part.stored["agreement"], batch.stored["agreement"][5:25][valid[5:25]])
