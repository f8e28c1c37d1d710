"""Three algorithms in float64, by their formulas, for the tests of add-ons around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pytest
import torch

from hpdist.algorithms import (
    Algorithm,
    FixMatch,
    FreeMatch,
    MixMatch,
)
from hpdist.algorithms.parts.mixing import draw_mixing
from hpdist.algorithms.positions import BatchPositions
from tests.support.algorithm_runs import (
    GlobalBatch,
    Ran,
    cross_entropy,
    global_batch,
    softmax,
    squared_error,
)

CLASSES = 5


COUNTS = np.array([40.0, 11.0, 6.0, 3.0, 0.0])


@dataclass
class Seen:
    """The logits that an algorithm sees: what the model said, or an add-on's version of it."""

    labeled: np.ndarray
    labels: np.ndarray
    weak: list[np.ndarray]
    student: list[np.ndarray]  # every part of the student's beside the labelled one


@dataclass
class Judged:
    """The terms of a step, and the loss's slope to the labelled logits and the student's others."""

    supervised: float
    unsupervised: float
    loss: float
    slopes: list[np.ndarray]


class Reference(Protocol):
    """An algorithm's formula."""

    def __call__(self, seen: Seen, batch: GlobalBatch) -> Judged: ...


class OfFixMatch:
    """Threshold 0.6, weight 0.7."""

    def __call__(self, seen: Seen, batch: GlobalBatch) -> Judged:
        q = softmax(seen.weak[0])
        return _masked(seen, q.max(axis=1) >= 0.6, 0.7)


class OfFreeMatch:
    """Momentum 0.5, weight 0.7, fairness 0.3."""

    def __init__(self) -> None:
        self.tau, self.p, self.h = 1 / CLASSES, *np.full((2, CLASSES), 1 / CLASSES)

    def __call__(self, seen: Seen, batch: GlobalBatch) -> Judged:
        q, n = softmax(seen.weak[0]), len(seen.weak[0])
        top = np.eye(CLASSES)[q.argmax(axis=1)]
        self.tau = (self.tau + q.max(axis=1).mean()) / 2
        self.p, self.h = (self.p + q.mean(axis=0)) / 2, (self.h + top.mean(axis=0)) / 2
        mask = q.max(axis=1) >= self.tau * (top @ self.p) / self.p.max()
        judged = _masked(seen, mask, 0.7)
        s = softmax(seen.student[0])
        sums, counts = s[mask].sum(axis=0), np.eye(CLASSES)[s[mask].argmax(axis=1)].sum(axis=0)
        there = counts > 0
        ratio = np.where(there, sums / np.maximum(counts, 1), 0)
        observed, expected = ratio / ratio.sum(), (self.p / self.h) / (self.p / self.h).sum()
        judged.loss += 0.3 * (expected * np.log(observed + 1e-12)).sum()
        share = there * expected * observed / (observed + 1e-12)
        slope = 0.3 * (share - observed * share.sum()) / sums * mask[:, None]
        judged.slopes[1] = judged.slopes[1] + s * (slope - (slope * s).sum(axis=1, keepdims=True))
        assert n == len(s)
        return judged


def _masked(seen: Seen, mask: np.ndarray, weight: float) -> Judged:
    """Labelled cross-entropy, and that of the strong view with the weak one's likeliest class."""
    losses, slopes = cross_entropy(seen.labeled, np.eye(CLASSES)[seen.labels])
    targets = np.eye(CLASSES)[seen.weak[0].argmax(axis=1)]
    u_losses, u_slopes = cross_entropy(seen.student[0], targets)
    x, u, n = losses.mean(), (u_losses * mask).mean(), len(mask)
    return Judged(
        x, u, x + weight * u, [slopes / len(slopes), weight * u_slopes * mask[:, None] / n]
    )


class OfMixMatch:
    """Temperature 0.4, alpha 0.6, weight 9, four groups."""

    def __call__(self, seen: Seen, batch: GlobalBatch) -> Judged:
        guess = sum(softmax(z) for z in seen.weak) / 2
        q = guess**2.5 / (guess**2.5).sum(axis=1, keepdims=True)
        one_hot, n = np.eye(CLASSES)[seen.labels], len(q)
        labels = mixed(batch, [one_hot, q, q])
        x, u1, u2 = np.split(labels, [len(one_hot), len(one_hot) + n])
        losses, slopes = cross_entropy(seen.labeled, x)
        judged = Judged(losses.mean(), 0, losses.mean(), [slopes / len(slopes)])
        for logits, target in zip(seen.student, (u1, u2), strict=True):
            losses, slopes = squared_error(logits, target)
            judged.unsupervised += losses.sum() / (2 * n)
            judged.loss += 9 * losses.sum() / (2 * n)
            judged.slopes.append(9 * slopes / (2 * n))
        return judged


def mixed(batch: GlobalBatch, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Labelled part and two unlabelled ones, mixed as the draws say."""
    usable = batch.usable.nonzero().flatten()
    x = torch.arange(len(batch.labels))
    at = BatchPositions(x, usable, len(x), len(batch.ids), seed=7, step=batch.step)
    mixing = draw_mixing(at, "mixmatch", 0.6, 4, labeled=1, unlabeled=2)
    rows, share = np.concatenate(parts), mixing.shares.double().numpy()[:, None]
    share = np.maximum(share, 1 - share)
    return share * rows + (1 - share) * rows[mixing.partners.numpy()]


MAKERS: dict[str, Callable[[], Algorithm]] = {
    "fixmatch": lambda: FixMatch(0.6, 0.7),
    "freematch": lambda: FreeMatch(
        CLASSES, momentum=0.5, unsupervised_weight=0.7, fairness_weight=0.3
    ),
    "mixmatch": lambda: MixMatch(
        temperature=0.4, alpha=0.6, unsupervised_weight=9.0, ramp_steps=0, groups=4
    ),
}


REFERENCES: dict[str, Callable[[], Reference]] = {
    "fixmatch": OfFixMatch,
    "freematch": OfFreeMatch,
    "mixmatch": OfMixMatch,
}


def said(batch: GlobalBatch, ran: Ran) -> Seen:
    """What the model said, as it is."""
    labeled, *student = ran.arrays("logits")
    weak = [(view[batch.usable] @ batch.student).double().numpy() for view in batch.weak]
    return Seen(labeled, batch.labels.numpy(), weak, student)


def check(ran: Ran, judged: Judged) -> None:
    """Terms and gradients of all parts, of which each has one."""
    assert ran.losses["supervised_loss"] == pytest.approx(judged.supervised, rel=1e-4)
    assert ran.losses["unsupervised_loss"] == pytest.approx(judged.unsupervised, rel=1e-4)
    assert ran.losses["loss"] == pytest.approx(judged.loss, rel=1e-4)
    for found, slopes in zip(ran.arrays("gradients"), judged.slopes, strict=True):
        assert np.abs(slopes).sum() > 0
        np.testing.assert_allclose(found, slopes, rtol=2e-3, atol=2e-6)


def batch_of(algorithm: Algorithm, step: int) -> GlobalBatch:
    """One whose model leans towards class 1, in some steps with rows that cannot be used."""
    batch = global_batch(algorithm, step, unusable=(1, 4, 5, 6, 7) if step % 2 else ())
    batch.student[:, 1] += 0.5 * batch.weak[0].flatten(1).mean(dim=0)
    return batch


def told(algorithm: Algorithm) -> Algorithm:
    algorithm.class_counts = torch.tensor(COUNTS).float()
    return algorithm
