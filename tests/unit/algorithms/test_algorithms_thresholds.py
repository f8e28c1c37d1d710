"""SoftMatch, AdaMatch and Dash over several steps, against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpdist.algorithms import AdaMatch, Dash, SoftMatch
from hpdist.errors import CheckpointError
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


def check(batch: Batch, terms, weights: np.ndarray, targets: np.ndarray, weight: float) -> None:
    """The whole loss and every gradient, of weighted soft or hard targets on the strong view."""
    logits, labels, strong = numpy(batch.labeled), batch.labels.numpy(), numpy(batch.strong[0])
    loss = (weights * cross_entropy(strong, targets)).mean()
    supervised = cross_entropy(logits, labels).mean()
    assert terms.metrics["mask_rate"].item() == pytest.approx(weights.mean(), rel=1e-4, abs=1e-6)
    assert terms.unsupervised.item() == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert terms.total(1).item() == pytest.approx(supervised + weight * loss, rel=1e-4)
    target = targets if targets.ndim == 2 else onehot(targets)
    gradient = weight * weights[:, None] * (softmax(strong) - target) / UNLABELED
    expected = {"strong 0": gradient} if np.abs(gradient).sum() > 0 else {}
    labeled = (softmax(logits) - onehot(labels)) / LABELED
    assert_gradients(batch, labeled=labeled, **expected)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("sigmas", [2.0, 1.0])
def test_softmatch(momentum: float, alignment: bool, sigmas: float) -> None:
    algorithm = SoftMatch(
        CLASSES,
        momentum=momentum,
        sigmas=sigmas,
        uniform_alignment=alignment,
        unsupervised_weight=0.5,
    )
    mu, var, mean = 1 / CLASSES, 1.0, np.full(CLASSES, 1 / CLASSES)
    for seed in range(6):
        batch = make_batch(seed, sharpness=1.5)
        batch.weak[:, 1] += 1.0
        terms = run(algorithm, batch)
        q = softmax(numpy(batch.weak))
        mu = momentum * mu + (1 - momentum) * q.max(axis=1).mean()
        var = momentum * var + (1 - momentum) * q.max(axis=1).var(ddof=1)
        mean = momentum * mean + (1 - momentum) * q.mean(axis=0)
        u = q / CLASSES / mean if alignment else q
        confidence = (u / u.sum(axis=1, keepdims=True)).max(axis=1)
        weights = np.exp(-(np.minimum(confidence - mu, 0) ** 2) / (2 * var / sigmas**2))
        assert 0.1 < weights.mean() < 1
        check(batch, terms, weights, q.argmax(axis=1), 0.5)
        algorithm.commit()
        assert algorithm.state["mean"].item() == pytest.approx(mu, rel=1e-5)
        assert algorithm.state["variance"].item() == pytest.approx(var, rel=1e-4)
        np.testing.assert_allclose(algorithm.state["probability"], mean, rtol=1e-5)


def test_softmatch_variance_of_almost_equal_confidences() -> None:
    """A sum of squares in fp32 would lose a variance of 1e-8 around a mean near 1."""
    algorithm = SoftMatch(CLASSES, momentum=0.0)
    batch = make_batch(0)
    rows = torch.linspace(9.0, 9.8, UNLABELED)[:, None]
    batch.weak = rows * torch.nn.functional.one_hot(torch.arange(UNLABELED) % CLASSES, CLASSES)
    confidence = softmax(numpy(batch.weak)).max(axis=1)
    for _ in range(2):  # the second time relative to the mean
        run(algorithm, batch)
        algorithm.commit()
    variance = confidence.var(ddof=1)
    assert 1e-9 < variance < 1e-7
    assert algorithm.state["variance"].item() == pytest.approx(variance, rel=0.02)


def test_softmatch_variance_of_one_row_is_left_out() -> None:
    algorithm = SoftMatch(CLASSES, momentum=0.5)
    run(algorithm, make_batch(0, unlabeled=1))
    algorithm.commit()
    assert algorithm.state["variance"].item() == 1
    assert algorithm.state["mean"].item() != pytest.approx(1 / CLASSES)


@pytest.mark.parametrize(
    "averages", [{}, {"window": 3}, {"window": 1}, {"momentum": 0.0}, {"momentum": 0.4}], ids=str
)
@pytest.mark.parametrize("tau", [0.9, 0.6])
def test_adamatch(averages: dict[str, float], tau: float) -> None:
    algorithm = AdaMatch(CLASSES, threshold=tau, unsupervised_weight=0.5, ramp_steps=4, **averages)
    momentum, window = averages.get("momentum"), averages.get("window", 128)
    kept = 0.999 if momentum is None else momentum
    p_x = p_u = np.full(CLASSES, 1 / CLASSES)
    means = [p_u] * window
    rates = []
    for step in range(6):
        batch = make_batch(step, sharpness=1.5)
        batch.weak[:, 1] += 1.0
        terms = run(algorithm, batch)
        q, x = softmax(numpy(batch.weak)), softmax(numpy(batch.weak_labeled))
        p_x = kept * p_x + (1 - kept) * x.mean(axis=0)
        means = [*means, q.mean(axis=0)][-window:]
        p_u = sum(means) / window if momentum is None else kept * p_u + (1 - kept) * means[-1]
        aligned = q * p_x / p_u
        aligned /= aligned.sum(axis=1, keepdims=True)
        mask = (aligned.max(axis=1) >= tau * x.max(axis=1).mean()).astype(float)
        rates.append(mask.mean())
        weight = 0.5 * (1 - np.cos(np.pi * min(step / 4, 1))) / 2
        check(batch, terms, mask, aligned.argmax(axis=1), weight)
        algorithm.commit()
        np.testing.assert_allclose(algorithm.state["labeled_probability"], p_x, rtol=1e-5)
        state = algorithm.state_dict()
        held = state["recent_probability"].mean(dim=0) if momentum is None else state["probability"]
        np.testing.assert_allclose(held, p_u, rtol=1e-5)
        assert len(state) == 3
    assert 0 < np.mean(rates) < 1


def test_an_average_of_another_kind_is_refused_by_its_setting() -> None:
    made = {
        "window": AdaMatch(CLASSES),
        "short": AdaMatch(CLASSES, window=4),
        "moving": AdaMatch(CLASSES, momentum=0.999),
    }
    for algorithm in made.values():
        run(algorithm, make_batch(1))
        algorithm.commit()
    expected = {
        ("window", "moving"): r"moving average .* set algorithm\.momentum",
        ("moving", "window"): r"algorithm\.momentum asks for .* leave it out",
        ("short", "window"): r"of 128 batches, and algorithm\.window is 4; set it to 128",
    }
    for (name, of), message in expected.items():
        before = made[name].state_dict()
        with pytest.raises(CheckpointError, match=message):
            made[name].load_state_dict(made[of].state_dict())
        assert all(torch.equal(before[key], v) for key, v in made[name].state_dict().items())
    again = AdaMatch(CLASSES, window=4)
    again.load_state_dict(made["short"].state_dict())
    assert torch.equal(again.state["recent_probability"], made["short"].state["recent_probability"])


def test_adamatch_aligns_the_label_too() -> None:
    algorithm = AdaMatch(CLASSES, momentum=0.0)
    batch = make_batch(0, sharpness=1.0)
    batch.weak[:, 1] += 4.0  # nearly all say class 1, the labelled rows do not
    plain = (softmax(numpy(batch.weak)).argmax(axis=1) == 1).mean()
    run(algorithm, batch)
    assert plain > 0.9
    moved = (batch.gradients()["strong 0"] < 0)[:, 1].sum()
    assert 0 < moved < 20


def test_dash() -> None:
    algorithm = Dash(
        warmup_steps=4,
        decay_steps=2,
        scale=1.1,
        decay=2.0,
        min_threshold=0.2,
        temperature=0.5,
        unsupervised_weight=0.5,
    )
    measured: list[float] = []
    hard, rates = [], []
    for step in range(16):
        batch = make_batch(step, sharpness=2.0)
        terms = run(algorithm, batch, parts=2)
        if step in (3, 4):  # the last quarter of the warm-up, and the first step after it
            losses = cross_entropy(numpy(batch.weak_labeled), batch.labels.numpy())
            measured += losses.tolist()
        threshold = 0.2
        if measured:
            falls = max(0, (step - 4) // 2)
            threshold = max(1.1 * 2.0**-falls * np.mean(measured), 0.2)
        weak = numpy(batch.weak)
        hard.append(threshold <= 0.2)
        target = onehot(weak.argmax(axis=1)) if hard[-1] else softmax(weak / 0.5)
        mask = (cross_entropy(weak, target) <= threshold) & (step >= 4)
        rates.append(mask.mean())
        check(batch, terms, mask.astype(float), target, 0.5)
        algorithm.commit()
    assert not any(rates[:4])
    assert not any(hard[4:8])
    assert all(hard[-2:])
    assert rates[4] > rates[9] > 0
    assert rates[-1] > 0


@pytest.mark.parametrize("skipped", [3, 4])
def test_dash_measures_the_labelled_loss_in_applied_steps_only(skipped: int) -> None:
    algorithm, plain = (Dash(warmup_steps=4, decay_steps=2) for _ in range(2))
    for step in range(6):
        if step == skipped:
            run(algorithm, make_batch(step + 50))
            algorithm.discard()
        for each in (algorithm, plain):
            run(each, make_batch(step))
            each.commit()
    assert algorithm.state["labeled_rows"].item() == 2 * LABELED
    assert torch.equal(algorithm.state["labeled_loss"], plain.state["labeled_loss"])


def test_hyperparameters_matter() -> None:
    """One change each gives another loss."""
    dash = {"warmup_steps": 0, "decay_steps": 1, "decay": 2.0}
    makers = [
        (
            lambda **k: SoftMatch(CLASSES, **{"momentum": 0.5, **k}),
            {"momentum": 0.9, "sigmas": 1.0, "uniform_alignment": False, "unsupervised_weight": 3},
        ),
        (
            lambda **k: AdaMatch(CLASSES, **{"momentum": 0.5, **k}),
            {
                "momentum": None,
                "threshold": 0.3,
                "unsupervised_weight": 3,
                "ramp_steps": 100,
            },
        ),
        (
            lambda **k: Dash(**{**dash, **k}),
            {
                "warmup_steps": 50,
                "decay_steps": 2,
                "scale": 2.0,
                "decay": 4.0,
                "min_threshold": 2.0,
                "temperature": 1.0,
                "unsupervised_weight": 3,
            },
        ),
    ]
    for maker, changes in makers:
        base = losses(maker())
        for name, value in changes.items():
            assert losses(maker(**{name: value})) != pytest.approx(base, rel=1e-6), name


def losses(algorithm) -> float:
    total = 0.0
    for seed in range(6):
        batch = make_batch(seed, sharpness=1.5)
        batch.weak[:, 1] += 1.0
        total += run(algorithm, batch).total(1).item()
        algorithm.commit()
    return total
