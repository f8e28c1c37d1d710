"""Each algorithm against a float64 reference written from the paper's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpdist.algorithms import (
    Algorithm,
    FixMatch,
    FreeMatch,
    LossTerms,
    StudentOutputs,
    Supervised,
    WeakOutputs,
)
from tests.support.algorithm_batches import cross_entropy, numpy, softmax

CLASSES, LABELED, UNLABELED = 5, 6, 40


def outputs(seed: int, sharpness: float = 3.0) -> StudentOutputs:
    """Random logits with gradient where the student has it."""
    generator = torch.Generator().manual_seed(seed)
    weak = sharpness * torch.randn(UNLABELED, CLASSES, generator=generator)
    return StudentOutputs(
        labeled=torch.randn(LABELED, CLASSES, generator=generator).requires_grad_(),
        labels=torch.randint(CLASSES, (LABELED,), generator=generator),
        strong=(torch.randn(UNLABELED, CLASSES, generator=generator).requires_grad_(),),
        weak=WeakOutputs(weak, torch.arange(UNLABELED)),
        labeled_rows=torch.tensor(float(LABELED)),
        unlabeled_rows=torch.tensor(float(UNLABELED)),
    )


def run(algorithm: Algorithm, batch: StudentOutputs) -> LossTerms:
    """What a step does, on one rank."""
    assert batch.weak is not None
    algorithm.observe(algorithm.statistics(batch.weak), batch.unlabeled_rows)
    return algorithm.loss(batch, algorithm.student_statistics(batch))


def cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return softmax(logits) - np.eye(logits.shape[1])[labels]


def test_supervised_is_the_mean_cross_entropy() -> None:
    batch = outputs(0)
    terms = Supervised().loss(batch, {})
    terms.total(1).backward()
    logits, labels = numpy(batch.labeled), batch.labels.numpy()
    assert terms.supervised.item() == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-6)
    expected = cross_entropy_gradient(logits, labels) / LABELED
    np.testing.assert_allclose(numpy(batch.labeled.grad), expected, rtol=1e-5, atol=1e-8)
    assert batch.strong[0].grad is None


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95])
def test_fixmatch(threshold: float) -> None:
    batch = outputs(1)
    terms = run(FixMatch(threshold, unsupervised_weight=0.7), batch)
    terms.total(1).backward()

    q = softmax(numpy(batch.weak.logits))
    mask, pseudo = q.max(axis=1) >= threshold, q.argmax(axis=1)
    strong = numpy(batch.strong[0])
    unsupervised = (mask * cross_entropy(strong, pseudo)).mean()
    supervised = cross_entropy(numpy(batch.labeled), batch.labels.numpy()).mean()
    assert 0 < mask.mean() <= 1
    assert terms.metrics["mask_rate"].item() == pytest.approx(mask.mean())
    assert terms.unsupervised.item() == pytest.approx(unsupervised, rel=1e-5)
    assert terms.total(1).item() == pytest.approx(supervised + 0.7 * unsupervised, rel=1e-5)
    expected = 0.7 * mask[:, None] * cross_entropy_gradient(strong, pseudo) / UNLABELED
    np.testing.assert_allclose(numpy(batch.strong[0].grad), expected, rtol=1e-4, atol=1e-8)
    assert np.abs(expected[mask]).sum() > 0


def test_fixmatch_where_no_row_passes() -> None:
    batch = outputs(2, sharpness=0.1)
    terms = run(FixMatch(0.95), batch)
    terms.total(1).backward()
    assert terms.unsupervised.item() == 0
    assert batch.strong[0].grad.abs().sum() == 0
    assert batch.labeled.grad.abs().sum() > 0


class FreeMatchReference:
    """Equations 5 to 14 of the FreeMatch paper in float64, on one global batch."""

    def __init__(self, momentum: float) -> None:
        self.m = momentum
        self.tau = 1 / CLASSES
        self.p = np.full(CLASSES, 1 / CLASSES)
        self.h = np.full(CLASSES, 1 / CLASSES)

    def step(self, weak: np.ndarray, strong: np.ndarray) -> tuple[float, float, float]:
        q = softmax(weak)
        confidence, pseudo = q.max(axis=1), q.argmax(axis=1)
        self.tau = self.m * self.tau + (1 - self.m) * confidence.mean()
        self.p = self.m * self.p + (1 - self.m) * q.mean(axis=0)
        counts = np.bincount(pseudo, minlength=CLASSES) / len(pseudo)
        self.h = self.m * self.h + (1 - self.m) * counts
        mask = confidence >= (self.tau * self.p / self.p.max())[pseudo]
        unsupervised = (mask * cross_entropy(strong, pseudo)).mean()
        return unsupervised, self.fairness(strong, mask), mask.mean()

    def fairness(self, strong: np.ndarray, mask: np.ndarray) -> float:
        p = softmax(strong)[mask]
        if len(p) == 0:
            return 0.0
        counts = np.bincount(p.argmax(axis=1), minlength=CLASSES)
        inverse = np.array([1 / c if c else 0.0 for c in counts])
        expected = self.p * np.array([1 / h if h else 0.0 for h in self.h])
        observed = p.mean(axis=0) * inverse
        expected, observed = expected / expected.sum(), observed / observed.sum()
        return float((expected * np.log(observed + 1e-12)).sum())


def test_freematch_over_several_steps() -> None:
    algorithm = FreeMatch(CLASSES, momentum=0.2, fairness_weight=0.3, unsupervised_weight=0.5)
    reference = FreeMatchReference(0.2)
    for seed in range(6):
        batch = outputs(seed, sharpness=1.5)
        weak, strong = numpy(batch.weak.logits), numpy(batch.strong[0])
        terms = run(algorithm, batch)
        unsupervised, fairness, rate = reference.step(weak, strong)
        assert 0 < rate < 1
        assert terms.metrics["mask_rate"].item() == pytest.approx(rate, abs=1e-6)
        assert terms.unsupervised.item() == pytest.approx(unsupervised, rel=1e-5)
        assert terms.global_extras["fairness_loss"].item() == pytest.approx(
            0.3 * fairness, rel=1e-4
        )
        algorithm.commit()
        assert algorithm.state["threshold"].item() == pytest.approx(reference.tau, rel=1e-6)
        np.testing.assert_allclose(numpy(algorithm.state["probability"]), reference.p, rtol=1e-5)
        np.testing.assert_allclose(numpy(algorithm.state["histogram"]), reference.h, rtol=1e-5)


def test_freematch_fairness_gradient_is_that_of_finite_differences() -> None:
    batch = outputs(3, sharpness=1.5)
    algorithm = FreeMatch(CLASSES, momentum=0.8, fairness_weight=1.0, unsupervised_weight=0.0)
    run(algorithm, batch).global_extras["fairness_loss"].backward()
    found = numpy(batch.strong[0].grad)
    weak, strong = numpy(batch.weak.logits), numpy(batch.strong[0])
    assert np.abs(found).sum() > 0
    for row, column in [(0, 0), (5, 2), (17, 4), (33, 1)]:
        values = []
        for sign in (1, -1):
            moved = strong.copy()
            moved[row, column] += sign * 1e-5
            values.append(FreeMatchReference(0.8).step(weak, moved)[1])
        expected = (values[0] - values[1]) / 2e-5
        assert found[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_freematch_survives_a_class_that_nobody_predicts_and_a_batch_that_nobody_passes() -> None:
    algorithm = FreeMatch(CLASSES, momentum=0.0, fairness_weight=1.0)
    batch = outputs(4)
    batch.weak.logits[:, 0] = -100.0  # class 0 is never predicted: its histogram becomes 0
    with torch.no_grad():
        batch.strong[0][:, 1] = -100.0
    terms = run(algorithm, batch)
    terms.total(1).backward()
    assert terms.total(1).isfinite()
    assert batch.strong[0].grad.isfinite().all()

    algorithm = FreeMatch(CLASSES, fairness_weight=1.0)
    algorithm.state["threshold"].fill_(2.0)  # nobody can pass
    batch = outputs(5)
    terms = run(algorithm, batch)
    terms.total(1).backward()
    assert terms.global_extras["fairness_loss"].item() == 0
    assert batch.strong[0].grad.abs().sum() == 0


def test_state_becomes_final_only_on_commit() -> None:
    algorithm = FreeMatch(CLASSES)
    before = algorithm.state_dict()
    run(algorithm, outputs(0))
    algorithm.discard()
    assert all(torch.equal(before[k], v) for k, v in algorithm.state_dict().items())
    run(algorithm, outputs(0))
    algorithm.commit()
    assert not torch.equal(before["threshold"], algorithm.state["threshold"])


def test_state_goes_round() -> None:
    algorithm, other = FreeMatch(CLASSES), FreeMatch(CLASSES)
    run(algorithm, outputs(0))
    algorithm.commit()
    other.load_state_dict(algorithm.state_dict())
    assert all(torch.equal(v, other.state[k]) for k, v in algorithm.state.items())
    with pytest.raises(KeyError, match="threshold"):
        other.load_state_dict({"nonsense": torch.zeros(1)})
