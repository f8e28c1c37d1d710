"""What several algorithms share: soft targets, ramps, alignment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpdist.algorithms.mean_teacher import MeanTeacher
from hpdist.algorithms.parts import ramps
from hpdist.algorithms.parts.alignment import aligned, moved, uniform_prior
from hpdist.tasks.losses import (
    entropy,
    hard_cross_entropy,
    kl_divergence,
    sharpened,
    soft_cross_entropy,
)
from tests.support.algorithm_batches import softmax

LOGITS = np.random.default_rng(0).normal(size=(7, 4)) * 3
OTHERS = np.random.default_rng(1).normal(size=(7, 4)) * 3


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_sharpened(temperature: float) -> None:
    found = sharpened(tensor(LOGITS), temperature)
    power = softmax(LOGITS) ** (1 / temperature)  # the papers' form, of probabilities
    np.testing.assert_allclose(found, power / power.sum(1, keepdims=True), rtol=1e-4, atol=1e-9)


def test_losses_and_their_gradients() -> None:
    p, q = softmax(LOGITS), softmax(OTHERS)
    logits = tensor(LOGITS).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    cases = {
        "cross": (soft_cross_entropy(logits, tensor(q)), -(q * np.log(p)).sum(1), p - q),
        "kl": (kl_divergence(tensor(OTHERS), logits), (q * np.log(q / p)).sum(1), p - q),
        "hard": (
            hard_cross_entropy(logits, labels),
            -np.log(p[range(7), labels]),
            p - np.eye(4)[labels],
        ),
        "entropy": (
            entropy(logits),
            -(p * np.log(p)).sum(1),
            -p * (np.log(p) - (p * np.log(p)).sum(1, keepdims=True)),
        ),
    }
    for name, (found, expected, gradient) in cases.items():
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-4, atol=1e-6, err_msg=name)
        (got,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
        np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_losses_of_certain_rows_are_finite() -> None:
    certain = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    for loss in (kl_divergence(certain.detach().flip(1), certain), entropy(certain)):
        (gradient,) = torch.autograd.grad(loss.sum(), certain, retain_graph=True)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (ramps.linear, [0, 0.25, 0.5, 1, 1]),
        (ramps.gaussian, [math.exp(-5), math.exp(-5 * 0.75**2), math.exp(-1.25), 1, 1]),
        (ramps.cosine, [0, (1 - math.sqrt(0.5)) / 2, 0.5, 1, 1]),
    ],
)
def test_ramps(ramp, values) -> None:
    found = [ramp(torch.tensor(float(step)), 8).item() for step in (0, 2, 4, 8, 80)]
    assert found == pytest.approx(values, abs=1e-6)
    assert ramp(torch.tensor(0.0), 0).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("schedule", "alphas"),
    [
        ("off", [1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 1]),
        ("log", [0, 1 - math.exp(-2.5), 1 - math.exp(-5), 1 - math.exp(-5)]),
        ("exp", [math.exp(-5), math.exp(-2.5), 1, 1]),
    ],
)
def test_annealing(schedule, alphas) -> None:
    steps = [torch.tensor(float(step)) for step in (0, 5, 10, 20)]
    found = [ramps.annealed_threshold(schedule, step, 10, 4).item() for step in steps]
    assert found == pytest.approx([a * 0.75 + 0.25 for a in alphas], abs=1e-6)


def test_alignment() -> None:
    mean, prior = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    expected = softmax(LOGITS) * prior / mean
    found = aligned(tensor(LOGITS), tensor(mean), tensor(prior))
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-4)
    same = aligned(tensor(LOGITS), uniform_prior(4), uniform_prior(4))
    np.testing.assert_allclose(same, softmax(LOGITS), rtol=1e-4)


def test_alignment_with_classes_that_nobody_predicts() -> None:
    mean, prior = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])
    found = aligned(tensor(LOGITS), mean, prior)
    assert found.isfinite().all()
    np.testing.assert_allclose(found.sum(dim=1), 1, rtol=1e-5)


def test_moving_average() -> None:
    assert moved(torch.tensor(1.0), torch.tensor(3.0), 0.75).item() == pytest.approx(1.5)
    assert moved(torch.tensor(1.0), torch.tensor(3.0), 0.0).item() == 3


def test_mean_teacher_ramps_over_applied_steps() -> None:
    algorithm = MeanTeacher(8.0, ramp_steps=4)
    assert [float(_weight(algorithm)) for _ in range(6)] == [0, 2, 4, 6, 8, 8]
    assert float(_weight(MeanTeacher(8.0))) == 8


def _weight(algorithm: MeanTeacher) -> torch.Tensor:
    from hpdist.algorithms import StudentOutputs, WeakOutputs

    zeros, one = torch.zeros(1, 3), torch.tensor(1.0)
    weak = WeakOutputs(zeros, torch.zeros(1).long())
    labels = torch.zeros(1).long()
    for _ in range(2):  # a step that is skipped, and one that is applied
        algorithm.observe({}, one)
        outputs = StudentOutputs(zeros, labels, (), weak, one, one, student_weak=(zeros,))
        weight = algorithm.loss(outputs, {}).unsupervised_weight
        algorithm.discard()
    algorithm.observe({}, one)
    algorithm.commit()
    return torch.as_tensor(weight)
