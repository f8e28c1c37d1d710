"""Add-ons around several algorithms, over several steps, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import pytest
import torch

from hpdist.algorithms import (
    Algorithm,
    AlgorithmConfig,
    DebiasPL,
    FixMatch,
    FreeMatch,
    LogitAdjustment,
    MixMatch,
)
from hpdist.algorithms.addon import AddOnConfig, build_algorithm
from hpdist.algorithms.base import Places
from hpdist.algorithms.mixing import draw_mixing
from hpdist.config import component_names, components
from hpdist.errors import ConfigError
from tests.algorithm_runs import (
    GlobalBatch,
    Ran,
    cross_entropy,
    global_batch,
    run,
    softmax,
    squared_error,
)
from tests.catalogue import ADDON_SETTINGS, SETTINGS

CLASSES = 5
COUNTS = np.array([40.0, 11.0, 6.0, 3.0, 0.0])
PARTS = {"fixmatch": 2, "freematch": 2, "mixmatch": 3}


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
    at = Places(x, usable, len(x), len(batch.ids), seed=7, step=batch.step)
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
    batch.student[:, 1] += 0.5 * batch.weak[0].mean(dim=0)
    return batch


def told(algorithm: Algorithm) -> Algorithm:
    algorithm.class_counts = torch.tensor(COUNTS).float()
    return algorithm


SHIFT = np.log(np.maximum(COUNTS, 0.5) / np.maximum(COUNTS, 0.5).sum())


@pytest.mark.parametrize("name", list(MAKERS))
def test_logit_adjustment(name: str) -> None:
    algorithm = told(LogitAdjustment(MAKERS[name](), tau=0.8))
    reference = REFERENCES[name]()
    for step in range(4):
        batch = batch_of(algorithm, step)
        ran = run(algorithm, batch)
        seen = said(batch, ran)
        seen.labeled = seen.labeled + 0.8 * SHIFT
        check(ran, reference(seen, batch))


@pytest.mark.parametrize("name", list(MAKERS))
def test_debiaspl(name: str) -> None:
    algorithm = DebiasPL(MAKERS[name](), CLASSES, tau=0.6, momentum=0.3)
    reference = REFERENCES[name]()
    p = np.full(CLASSES, 1 / CLASSES)
    moves = []
    for step in range(5):
        batch = batch_of(algorithm, step)
        ran = run(algorithm, batch)
        seen = said(batch, ran)
        plain = softmax(seen.weak[0])
        shift = 0.6 * np.log(p)
        moves.append(np.ptp(shift))
        seen.weak = [z - shift for z in seen.weak]
        seen.student = [z + shift for z in seen.student]
        check(ran, reference(seen, batch))
        p = 0.3 * p + 0.7 * plain.mean(axis=0)
        state = algorithm.state_dict()["debiaspl.probability"]
        assert state.shape == (CLASSES,)
        np.testing.assert_allclose(state.numpy(), p, rtol=1e-5)
    assert moves[0] == 0
    assert min(moves[1:]) > 0.1  # of one number for all classes a softmax would not know


def test_debiaspl_changes_which_class_is_the_pseudo_label() -> None:
    """A scalar in place of p would leave every target as it was."""
    algorithm, plain = DebiasPL(FixMatch(0.0), CLASSES, tau=1.0, momentum=0.0), FixMatch(0.0)
    changed = 0
    for step in range(5):
        batch = batch_of(algorithm, step)
        ran, other = run(algorithm, batch), run(plain, batch)
        pairs = zip(ran.gradients[1], other.gradients[1], strict=True)
        changed += sum(int(a.argmin() != b.argmin()) for a, b in pairs)
    assert changed >= 5


@pytest.mark.parametrize(
    "order", [("logit_adjustment", "debiaspl"), ("debiaspl", "logit_adjustment")]
)
@pytest.mark.parametrize("name", list(MAKERS))
def test_two_around_one_another(name: str, order: tuple[str, str]) -> None:
    algorithm = MAKERS[name]()
    for addon in order:
        algorithm = (
            LogitAdjustment(algorithm, tau=0.8)
            if addon == "logit_adjustment"
            else DebiasPL(algorithm, CLASSES, tau=0.6, momentum=0.3)
        )
    told(algorithm)
    reference, p = REFERENCES[name](), np.full(CLASSES, 1 / CLASSES)
    for step in range(4):
        batch = batch_of(algorithm, step)
        ran = run(algorithm, batch)
        seen = said(batch, ran)
        plain = softmax(seen.weak[0]).mean(axis=0)
        seen.labeled = seen.labeled + 0.8 * SHIFT
        seen.weak = [z - 0.6 * np.log(p) for z in seen.weak]
        seen.student = [z + 0.6 * np.log(p) for z in seen.student]
        check(ran, reference(seen, batch))
        p = 0.3 * p + 0.7 * plain


class Counting(LogitAdjustment):
    """An add-on with a state whose names are those of the algorithm inside."""

    name = "counter"

    def __init__(self, base: Algorithm) -> None:
        super().__init__(base)
        self.own = {"probability": torch.zeros(()), "threshold": torch.zeros(2)}
        self.own_pending = dict(self.own)

    def own_observe(self, sums, unlabeled_rows):  # type: ignore[no-untyped-def]
        return {name: value + 1 for name, value in self.own.items()}


def test_state_goes_round_with_a_prefix_for_each_add_on() -> None:
    def make() -> Algorithm:
        return told(Counting(DebiasPL(MAKERS["freematch"](), CLASSES, momentum=0.3)))

    algorithm, other = make(), make()
    for step in range(3):
        run(algorithm, batch_of(algorithm, step))
    state = {name: value.clone() for name, value in algorithm.state_dict().items()}
    assert sorted(state) == [
        "counter.probability",
        "counter.threshold",
        "debiaspl.probability",
        "histogram",
        "probability",
        "threshold",
    ]
    assert state["counter.threshold"].tolist() == [3, 3]
    assert not torch.equal(state["debiaspl.probability"], state["probability"])
    other.load_state_dict(state)
    batch = batch_of(algorithm, 3)
    assert run(other, batch).losses == run(algorithm, batch).losses
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for name in state:
        with pytest.raises(KeyError):
            other.load_state_dict({k: v for k, v in state.items() if k != name})


def test_class_counts_that_are_missing_are_asked_for() -> None:
    algorithm = LogitAdjustment(DebiasPL(FixMatch(), CLASSES))
    with pytest.raises(
        ConfigError,
        match=r"LogitAdjustment needs to know .* algorithm.class_counts = torch\.bincount",
    ):
        run(algorithm, global_batch(algorithm, 0))
    inner = DebiasPL(LogitAdjustment(FixMatch()), CLASSES)
    inner.class_counts = torch.ones(CLASSES)
    run(inner, global_batch(inner, 0))
    assert inner.base.base.class_counts is inner.class_counts


CHANGES: list[tuple[str, dict[str, object]]] = [
    ("logit_adjustment", {"tau": 0.5}),
    ("debiaspl", {"tau": 0.8}),
    ("debiaspl", {"momentum": 0.5}),
]


def losses(addon: str, options: dict[str, object]) -> list[float]:
    config = cast(dict[str, type[AddOnConfig]], components("addon"))[addon](name=addon, **options)
    algorithm = told(build_algorithm(FixMatchAt(), [config], CLASSES, steps=6))
    return [run(algorithm, batch_of(algorithm, step)).losses["loss"] for step in range(5)]


class FixMatchAt(AlgorithmConfig):
    """FixMatch for the tests."""

    name: str = "fixmatch"

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Algorithm:
        return FixMatch(0.6, 0.7)


@pytest.mark.parametrize(("addon", "change"), CHANGES)
def test_every_option_changes_the_loss(addon: str, change: dict[str, object]) -> None:
    settings = ADDON_SETTINGS.get(addon, {}) | {"momentum": 0.9} if addon == "debiaspl" else {}
    plain, other = losses(addon, settings), losses(addon, settings | change)
    assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) > 1e-4


BASES = ["freematch", "mixmatch", "mean_teacher", "remixmatch"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("addon", component_names("addon"))
def test_around_other_algorithms(addon: str, base: str) -> None:
    """Finite, different from the algorithm alone, and the same on several ranks."""
    algorithms = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    addons = cast(dict[str, type[AddOnConfig]], components("addon"))

    def make(*around: str) -> Algorithm:
        config = algorithms[base](name=base, **SETTINGS.get(base, {}))
        outer = [addons[name](name=name, **ADDON_SETTINGS.get(name, {})) for name in around]
        return told(build_algorithm(config, outer, CLASSES, steps=40))

    whole, cut, alone = make(addon), make(addon), make()
    differs = False
    for step in range(5):
        batch = batch_of(whole, step)
        expected, found = run(whole, batch), run(cut, batch, ranks=4)
        assert all(np.isfinite(value) for value in expected.losses.values())
        assert found.losses == pytest.approx(expected.losses, rel=1e-4, abs=1e-6)
        for one, many in zip(expected.gradients, found.gradients, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-6)
        plain = run(alone, batch_of(alone, step))
        differs |= abs(plain.losses["loss"] - expected.losses["loss"]) > 1e-4
    assert differs
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[key], value)
