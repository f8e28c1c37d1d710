"""Pseudo-labels, entropy minimisation, UDA, ReFixMatch and DeFixMatch against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpdist.algorithms import (
    UDA,
    AnnealedUDA,
    DeFixMatch,
    EntropyMinimization,
    PseudoLabel,
    ReFixMatch,
)
from hpdist.algorithms.uda import UDAConfig
from tests.support.algorithm_batches import (
    CLASSES,
    LABELED,
    UNLABELED,
    Batch,
    assert_gradients,
    cross_entropy,
    make_batch,
    numpy,
    onehot,
    run,
    softmax,
)


def supervised(batch: Batch) -> tuple[float, np.ndarray]:
    """The labelled loss and its gradient."""
    logits, labels = numpy(batch.labeled), batch.labels.numpy()
    return cross_entropy(logits, labels).mean(), (softmax(logits) - onehot(labels)) / LABELED


def confident(logits: torch.Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, mask and labels."""
    q = softmax(numpy(logits))
    return q, (q.max(axis=1) >= threshold).astype(float), q.argmax(axis=1)


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_pseudo_label(threshold: float) -> None:
    algorithm = PseudoLabel(threshold=threshold, unsupervised_weight=2.0, ramp_steps=4)
    for step in range(6):
        batch = make_batch(step)
        terms = run(algorithm, batch)
        weight = 2.0 * min(step / 4, 1)
        x_loss, labeled = supervised(batch)
        p, mask, pseudo = confident(batch.student_weak, threshold)
        loss = (mask * cross_entropy(numpy(batch.student_weak), pseudo)).mean()
        assert terms.unsupervised.item() == pytest.approx(loss, rel=1e-5)
        assert terms.total(1).item() == pytest.approx(x_loss + weight * loss, rel=1e-5)
        assert terms.metrics["mask_rate"].item() == pytest.approx(mask.mean())
        gradient = weight * mask[:, None] * (p - onehot(pseudo)) / UNLABELED
        expected = {"student_weak": gradient} if step else {}
        assert_gradients(batch, labeled=labeled, **expected)
        algorithm.commit()


def test_entropy_minimization() -> None:
    batch = make_batch(1, sharpness=1.0)
    terms = run(EntropyMinimization(0.3), batch)
    x_loss, labeled = supervised(batch)
    p = softmax(numpy(batch.student_weak))
    values = -(p * np.log(p)).sum(axis=1)
    assert terms.unsupervised.item() == pytest.approx(values.mean(), rel=1e-5)
    assert terms.total(1).item() == pytest.approx(x_loss + 0.3 * values.mean(), rel=1e-5)
    gradient = -0.3 * p * (np.log(p) + values[:, None]) / UNLABELED  # through both factors
    assert_gradients(batch, labeled=labeled, student_weak=gradient)


@pytest.mark.parametrize(("threshold", "temperature"), [(0.8, 0.5), (0.8, 1.0), (1.1, 0.5)])
def test_refixmatch(threshold: float, temperature: float) -> None:
    batch = make_batch(2)
    algorithm = ReFixMatch(threshold=threshold, temperature=temperature, unsupervised_weight=0.5)
    terms = run(algorithm, batch)
    x_loss, labeled = supervised(batch)
    _, mask, pseudo = confident(batch.weak, threshold)
    target, p = softmax(numpy(batch.weak) / temperature), softmax(numpy(batch.strong[0]))
    loss = (mask * cross_entropy(numpy(batch.strong[0]), pseudo)).mean()
    rejected = ((1 - mask) * (target * np.log(target / p)).sum(axis=1)).mean()
    assert terms.unsupervised.item() == pytest.approx(loss, rel=1e-5)
    assert terms.extras["rejected_loss"].item() == pytest.approx(0.5 * rejected, rel=1e-5)
    assert terms.total(1).item() == pytest.approx(x_loss + 0.5 * (loss + rejected), rel=1e-5)
    m = mask[:, None]
    gradient = 0.5 * (m * (p - onehot(pseudo)) + (1 - m) * (p - target)) / UNLABELED
    assert_gradients(batch, labeled=labeled, **{"strong 0": gradient})
    assert (np.abs(gradient).sum(axis=1) > 0).all(), "every row teaches something"


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_defixmatch(threshold: float) -> None:
    batch = make_batch(3)
    terms = run(DeFixMatch(threshold=threshold, unsupervised_weight=0.7), batch)
    x_loss, labeled = supervised(batch)
    _, mask, pseudo = confident(batch.weak, threshold)
    _, x_mask, x_pseudo = confident(batch.weak_labeled, threshold)
    strong, x_strong, y = numpy(batch.strong[0]), numpy(batch.strong_labeled), batch.labels.numpy()
    loss = (mask * cross_entropy(strong, pseudo)).mean()
    bias = (x_mask * cross_entropy(x_strong, x_pseudo)).mean()
    both = (x_loss + cross_entropy(x_strong, y).mean()) / 2
    assert x_mask.mean() > 0
    assert terms.supervised.item() == pytest.approx(both, rel=1e-5)
    assert terms.extras["debiasing_loss"].item() == pytest.approx(-0.7 * bias, rel=1e-5)
    assert terms.total(1).item() == pytest.approx(both + 0.7 * (loss - bias), rel=1e-4)
    p, x_p = softmax(strong), softmax(x_strong)
    to_bias = x_mask[:, None] * (x_p - onehot(x_pseudo))
    assert_gradients(
        batch,
        labeled=labeled / 2,
        strong_labeled=((x_p - onehot(y)) / 2 - 0.7 * to_bias) / LABELED,
        **{"strong 0": 0.7 * mask[:, None] * (p - onehot(pseudo)) / UNLABELED},
    )


@pytest.mark.parametrize(("threshold", "temperature"), [(0.8, 0.4), (0.5, 0.4), (0.8, 2.0)])
def test_uda(threshold: float, temperature: float) -> None:
    batch = make_batch(4)
    algorithm = UDA(threshold=threshold, temperature=temperature, unsupervised_weight=0.5)
    terms = run(algorithm, batch)
    x_loss, labeled = supervised(batch)
    q = softmax(numpy(batch.weak))
    mask = q.max(axis=1) > threshold
    target, strong = softmax(numpy(batch.weak) / temperature), numpy(batch.strong[0])
    loss = (mask * cross_entropy(strong, target)).mean()
    assert 0 < mask.mean() < 1
    assert terms.metrics["mask_rate"].item() == pytest.approx(mask.mean())
    assert terms.total(1).item() == pytest.approx(x_loss + 0.5 * loss, rel=1e-5)
    gradient = 0.5 * mask[:, None] * (softmax(strong) - target) / UNLABELED
    assert_gradients(batch, labeled=labeled, **{"strong 0": gradient})


ALPHAS = {
    "linear": lambda t: t,
    "log": lambda t: 1 - np.exp(-5 * t),
    "exp": lambda t: np.exp(5 * (t - 1)),
}


@pytest.mark.parametrize("schedule", ALPHAS)
def test_uda_lets_labels_in_slowly(schedule: str) -> None:
    algorithm = UDAConfig(annealing=schedule).build(CLASSES, steps=10)
    assert isinstance(algorithm, AnnealedUDA)
    kept = []
    for step in range(12):
        batch = make_batch(step)
        terms = run(algorithm, batch, parts=2)
        alpha = ALPHAS[schedule](min(step / 10, 1))
        threshold = alpha * (1 - 1 / CLASSES) + 1 / CLASSES
        labels = batch.labels.numpy()
        keep = softmax(numpy(batch.weak_labeled))[np.arange(LABELED), labels] <= threshold
        kept.append(keep.sum())
        logits = numpy(batch.labeled)
        loss = (keep * cross_entropy(logits, labels)).sum() / max(keep.sum(), 1)
        assert terms.supervised.item() == pytest.approx(loss, rel=1e-5)
        expected = keep[:, None] * (softmax(logits) - onehot(labels)) / max(keep.sum(), 1)
        found = batch.gradients()["labeled"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
        algorithm.commit()
    assert kept[0] < LABELED
    assert kept[-1] == LABELED or schedule == "log"


def test_uda_where_no_label_is_let_in() -> None:
    algorithm = UDAConfig(annealing="linear").build(CLASSES, steps=10)
    batch = make_batch(0)
    batch.weak_labeled = 20 * torch.nn.functional.one_hot(batch.labels, CLASSES).float()
    terms = run(algorithm, batch)
    assert terms.supervised == 0
    assert not batch.gradients()["labeled"].any()


def test_hyperparameters_matter() -> None:
    """One change each gives another loss."""
    makers = [
        (PseudoLabel, {"threshold": 0.5, "unsupervised_weight": 3.0, "ramp_steps": 100}),
        (ReFixMatch, {"threshold": 0.5, "temperature": 1.0, "unsupervised_weight": 3.0}),
        (DeFixMatch, {"threshold": 0.5, "unsupervised_weight": 3.0}),
        (UDA, {"threshold": 0.5, "temperature": 1.0, "unsupervised_weight": 3.0}),
        (EntropyMinimization, {"unsupervised_weight": 3.0}),
    ]
    for maker, changes in makers:
        base = run(maker(), make_batch(5)).total(1).item()
        for name, value in changes.items():
            changed = run(maker(**{name: value}), make_batch(5)).total(1).item()
            assert changed != pytest.approx(base, rel=1e-6), (maker, name)
