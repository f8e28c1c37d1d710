"""Add-ons around several algorithms, over several steps, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hpdist.algorithms import (
    ABC,
    DARP,
    Algorithm,
    AlgorithmConfig,
    DebiasPL,
    FixMatch,
    FreeMatch,
    LogitAdjustment,
    LossTerms,
    MixMatch,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.addon import AddOnConfig, build_algorithm
from hpdist.algorithms.base import Places, StudentInputs, Sums, supervised_loss
from hpdist.algorithms.darp import DARPConfig, refined
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.algorithms.mixing import draw_mixing
from hpdist.config import component_names, components
from hpdist.data.batch import LabeledBatch
from hpdist.errors import ConfigError
from hpdist.evaluation import evaluate_both
from hpdist.models.heads import WithHeads
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
from tests.recipes import digits, make_step, train

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
    batch.student[:, 1] += 0.5 * batch.weak[0].flatten(1).mean(dim=0)
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
    ("abc", {"threshold": 0.9}),
    *(("darp", {key: value}) for key, value in [("warmup", 0.5), ("every", 3), ("alpha", 1.0)]),
    ("darp", {"iterations": 1}),
    ("darp", {"distribution": [1, 1, 1, 1, 1]}),
]


FIXMATCH = FixMatchConfig(threshold=0.6, unsupervised_weight=0.7)
PLAIN: dict[str, dict[str, object]] = {
    "debiaspl": {"momentum": 0.9},
    "abc": {"threshold": 0.3},
    "darp": {"warmup": 0.0, "every": 1},
}


def losses(addon: str, options: dict[str, object]) -> list[float]:
    config = cast(dict[str, type[AddOnConfig]], components("addon"))[addon](name=addon, **options)
    algorithm = told(build_algorithm(FIXMATCH, [config], CLASSES, steps=6))
    return [run(algorithm, batch_of(algorithm, step)).losses["loss"] for step in range(5)]


@pytest.mark.parametrize(("addon", "change"), CHANGES)
def test_every_option_changes_the_loss(addon: str, change: dict[str, object]) -> None:
    settings = PLAIN.get(addon, {})
    plain, other = losses(addon, settings), losses(addon, settings | change)
    assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) > 1e-4


ABC_PARTS = {  # the head's outputs that its loss goes over: labelled rows, and strong views
    "fixmatch": (0, [1]),
    "freematch": (0, [1]),
    "mixmatch": (3, [4]),
    "sequencematch": (0, [1, 2]),
    "supervised": (0, [1]),
    "mean_teacher": (0, [2]),
}
LIKE_COUNTS = np.array([40.0, 10.0, 8.0, 5.0, 0.0])  # of the last class no row has a label


def abc_batch(algorithm: Algorithm, step: int) -> GlobalBatch:
    batch = batch_of(algorithm, step)
    batch.labels %= CLASSES - 1
    for part in (batch.labeled, *batch.weak, *batch.strong):
        part *= 2
    return batch


def plain_batch(batch: GlobalBatch, algorithm: Algorithm) -> GlobalBatch:
    """The same with no more views and heads than the algorithm asks for."""
    views = algorithm.views
    return replace(
        batch,
        weak=batch.weak[: views.weak],
        strong=batch.strong[: views.strong],
        heads={name: batch.heads[name] for name in algorithm.head_names},
    )


@pytest.mark.parametrize("name", list(ABC_PARTS))
def test_abc(name: str) -> None:
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    base = MAKERS[name]() if name in MAKERS else configs[name](name=name).build(CLASSES)
    algorithm = ABC(base, CLASSES, threshold=0.5, steps=4)
    algorithm.class_counts = torch.tensor(LIKE_COUNTS).float()
    ratio = np.array([5 / 40, 0.5, 5 / 8, 1, 1])
    at, strong_at = ABC_PARTS[name]
    drawn = np.zeros(4)
    for step in range(6):
        batch = abc_batch(algorithm, step)
        ran = run(algorithm, batch)
        places = Places(
            torch.arange(8), batch.usable.nonzero().flatten(), 8, 16, seed=7, step=batch.step
        )
        outputs = [part.detach().double().numpy() for part in ran.heads["abc"]]
        labels, rows = batch.labels.numpy(), int(batch.usable.sum())
        draws = places.noise("abc", 1, labeled=True)[:, 0].double().numpy()
        kept = (draws < ratio[labels]).astype(float)
        losses, slopes = cross_entropy(outputs[at], np.eye(CLASSES)[labels])
        expected = {at: slopes * kept[:, None] / 8}
        supervised = (losses * kept).sum() / 8
        with torch.no_grad():
            said_weak = batch.heads["abc"](batch.weak[0][batch.usable]).double().numpy()
        q = softmax(said_weak)
        mask = q.max(axis=1) >= 0.5
        draws = places.noise("abc", 1)[:, 0].double().numpy()
        keep = draws < 1 - min(step / 4, 1) * (1 - ratio[q.argmax(axis=1)])
        drawn += kept.sum(), len(kept), (keep & mask).sum(), mask.sum()
        unsupervised = 0.0
        for part in strong_at:
            losses, slopes = cross_entropy(outputs[part], q)
            unsupervised += (losses * (mask & keep)).sum() / rows
            expected[part] = slopes * (mask & keep)[:, None] / rows
        assert ran.losses["abc_supervised_loss"] == pytest.approx(supervised, rel=1e-4)
        assert ran.losses["abc_unsupervised_loss"] == pytest.approx(unsupervised, rel=1e-4)
        assert ran.losses["abc_mask_rate"] == pytest.approx((mask & keep).mean(), rel=1e-5)
        for part, found in enumerate(ran.head_gradients["abc"]):
            if part in expected:
                assert np.abs(expected[part]).sum() > 0
                np.testing.assert_allclose(found, expected[part], rtol=1e-3, atol=1e-7)
            else:
                assert not found.any()
        alone = MAKERS[name]() if name in MAKERS else configs[name](name=name).build(CLASSES)
        if step == 0:  # the state of the one inside is new too
            other = run(alone, plain_batch(batch, alone))
            whole = other.losses["loss"] + supervised + unsupervised
            assert ran.losses["loss"] == pytest.approx(whole, rel=1e-4)
    assert algorithm.state_dict()["abc.step"] == 6
    assert drawn[0] < 0.8 * drawn[1]
    assert 0 < drawn[2] < drawn[3]


@pytest.mark.parametrize("name", component_names("algorithm"))
def test_the_algorithm_inside_abc_sees_what_it_asked_for(name: str) -> None:
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    config = configs[name](name=name, **SETTINGS.get(name, {}))
    alone, inside = (config.build(CLASSES, steps=40) for _ in range(2))
    algorithm = told(ABC(inside, CLASSES, threshold=0.3, steps=4))
    alone.rows = algorithm.rows = 32
    for step in range(4):
        batch = abc_batch(algorithm, step)
        plain = plain_batch(batch, alone)
        found, expected = run(algorithm, batch), run(alone, plain)
        for name_, value in expected.losses.items():
            if name_ != "loss":
                assert found.losses[name_] == value, name_
        own = found.losses["abc_supervised_loss"] + found.losses["abc_unsupervised_loss"]
        assert found.losses["loss"] == pytest.approx(expected.losses["loss"] + own, rel=1e-5)
        assert own > 0
        parts = len(expected.gradients)
        for one, other in zip(expected.gradients, found.gradients[:parts], strict=True):
            torch.testing.assert_close(other, one)
        assert not any(part.any() for part in found.gradients[parts:])


class Strict(Algorithm):
    """Asks for one view of the student's, adds one input, and refuses anything else."""

    views: ClassVar[Views] = Views(student_weak=1)

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        raise AssertionError("no weak view was asked for")

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        assert weak is None
        assert (len(inputs.weak), len(inputs.strong), len(inputs.student_weak)) == (0, 0, 1)
        return replace(inputs, further=(inputs.labeled,))

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        assert outputs.weak is None
        assert (len(outputs.strong), len(outputs.further), len(outputs.student_weak)) == (0, 1, 1)
        for head in outputs.heads.values():
            assert len(head.further) == 1
        term = outputs.further[0].sum() + outputs.student_weak[0].sum()
        return LossTerms(supervised_loss(outputs), term)


def test_abc_hides_its_own_views_from_an_algorithm_that_asked_for_none() -> None:
    algorithm = told(ABC(Strict(), CLASSES, threshold=0.3, steps=4))
    ran = run(algorithm, global_batch(algorithm, 0), ranks=2)
    assert [len(part) for part in ran.gradients] == [8, 16, 8, 8, 16]
    assert ran.losses["abc_unsupervised_loss"] > 0


def test_abc_predicts_with_its_head() -> None:
    """In evaluation, of student and teacher alike; a model that is not trained knows no head."""
    algorithm = ABC(FixMatch(), 10, steps=4)
    algorithm.class_counts = torch.arange(10.0, 0.0, -1.0)
    step = make_step(algorithm, decay=0.5)
    train(step, 2)
    engine, model = step.engine, step.engine.module
    assert isinstance(model, WithHeads)
    images, labels = digits()
    batch = LabeledBatch(images[:50], labels[:50], torch.arange(50))
    views, valid = step.views, torch.ones(50, dtype=torch.bool)

    def expected() -> tuple[float, float]:
        inputs = views.plain(images[:50])
        model.eval()
        with torch.no_grad():
            features = []
            last = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)][-1]
            hook = last.register_forward_pre_hook(lambda _, given: features.append(given[0]))
            logits = model.model(inputs)
            hook.remove()
            said = model.heads["abc"](features[0])
        assert not torch.allclose(said, logits)
        accuracy = (said.argmax(dim=1) == labels[:50]).float().mean().item()
        return accuracy, torch.nn.functional.cross_entropy(said, labels[:50]).item()

    found = evaluate_both(engine, step.teacher, views, lambda: [(batch, valid)]).values
    student = expected()
    assert found["accuracy_student"] == pytest.approx(student[0])
    assert found["loss_student"] == pytest.approx(student[1], rel=1e-4)
    assert step.teacher is not None
    with step.teacher.in_student():
        teacher = expected()
    assert found["loss"] == pytest.approx(teacher[1], rel=1e-4)
    assert teacher[1] != pytest.approx(student[1], rel=1e-4)


def test_abc_needs_to_know_the_labels() -> None:
    algorithm = ABC(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="ABC needs to know how many labelled rows"):
        run(algorithm, global_batch(algorithm, 0))


def aligned(said: np.ndarray, amounts: np.ndarray, alpha: float, rounds: int) -> np.ndarray:
    """DARP's refinement of a table, classes solved by halving intervals."""
    q = np.zeros_like(said)
    for c, amount in enumerate(amounts):
        top = np.argsort(-said[:, c], kind="stable")[: max(int(alpha * amount), 1)]
        q[top, c] = said[top, c] * amount / said[top, c].sum()
    q = (q + 1e-6) / (q + 1e-6).sum(axis=1, keepdims=True)
    h = -(q * np.log(q)).sum(axis=1)
    nu, logs = np.zeros(len(amounts)), np.log(q)

    def log_sum(values: np.ndarray, axis: int) -> np.ndarray:
        top = values.max(axis=axis, keepdims=True)
        return np.log(np.exp(values - top).sum(axis=axis)) + top.squeeze(axis)

    for _ in range(rounds):
        rows = -log_sum(logs - np.outer(h, nu), 1)
        for c, amount in enumerate(amounts):
            low, high = -1e7, 1e7
            for _ in range(100):
                nu[c] = (low + high) / 2
                more = log_sum(logs[:, c] + rows - nu[c] * h, 0) > np.log(amount)
                low, high = (nu[c], high) if more else (low, nu[c])
    x = logs - np.outer(h, nu)
    return np.exp(x - log_sum(x, 1)[:, None])


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(
    ("rows", "alpha", "rounds"), [(60, 2.0, 10), (60, 0.7, 1), (5, 4.0, 3), (5, 0.7, 3)]
)
def test_refinement_by_the_formula(rows: int, sharpness: float, alpha: float, rounds: int) -> None:
    noise = np.random.default_rng(rows)
    said = softmax(sharpness * noise.normal(size=(rows, CLASSES)) + np.arange(CLASSES))
    amounts = rows * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    found = refined(torch.tensor(said), torch.tensor(amounts), alpha, rounds).numpy()
    np.testing.assert_allclose(found, aligned(said, amounts, alpha, rounds), rtol=1e-6, atol=1e-12)


def test_of_equal_rows_the_first_keep_a_class() -> None:
    said = np.tile(softmax(np.arange(CLASSES)[None] / 3), (300, 1))
    amounts = 300 * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    found = refined(torch.tensor(said), torch.tensor(amounts), 1.0, 5).numpy()
    np.testing.assert_allclose(found, aligned(said, amounts, 1.0, 5), rtol=1e-6, atol=1e-12)
    assert found[0, 4] > 10 * found[20, 4]


def test_refinement_is_the_nearest_table_with_the_sums() -> None:
    """Where (log x - log q) / H(q) is one number for each row plus one for each class."""
    said = softmax(2 * np.random.default_rng(0).normal(size=(50, CLASSES)) + np.arange(CLASSES))
    amounts = 50 * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    x = refined(torch.tensor(said), torch.tensor(amounts), 100.0, 500).numpy()
    np.testing.assert_allclose(x.sum(axis=1), 1)
    np.testing.assert_allclose(x.sum(axis=0), amounts, rtol=1e-9)
    q = said * amounts / said.sum(axis=0) + 1e-6
    q /= q.sum(axis=1, keepdims=True)
    pulled = np.log(x / q) / -(q * np.log(q)).sum(axis=1)[:, None]
    of_classes = pulled - pulled[:, :1]
    np.testing.assert_allclose(of_classes, of_classes[:1].repeat(50, axis=0), atol=1e-6)
    assert np.ptp(of_classes[0]) > 0.1


@pytest.mark.parametrize("sharpness", [0.0, 1e4])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_refinement_of_extremes_is_finite(rows: int, sharpness: float) -> None:
    said = torch.randn(rows, CLASSES, dtype=torch.float64) * sharpness
    said[:, 0] += sharpness
    amounts = torch.tensor([1e-9, 0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    found = refined(said.softmax(dim=1), rows * amounts / amounts.sum(), 2.0, 10)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(rows, dtype=torch.float64))


SHARES = np.maximum(COUNTS, 0.5) / np.maximum(COUNTS, 0.5).sum()


@pytest.mark.parametrize("name", list(MAKERS))
def test_darp(name: str) -> None:
    algorithm = told(
        DARP(MAKERS[name](), CLASSES, warmup_steps=3, every=2, alpha=1.5, iterations=4)
    )
    reference = REFERENCES[name]()
    table: dict[int, np.ndarray] = {}
    targets: dict[int, np.ndarray] = {}
    rates = []
    for step in range(9):
        batch = batch_of(algorithm, step)
        if step == 6:
            batch.ids[3] = batch.ids[2]
            batch.ids[8], batch.ids[9] = 5000, 1024  # beyond the table as it is
        if step == 8:
            batch.ids[5] = 7000
        ran = run(algorithm, batch)
        seen = said(batch, ran)
        ids = batch.ids[batch.usable].tolist()
        means = np.mean([softmax(view) for view in seen.weak], axis=0)
        known = np.array([row in targets for row in ids])
        for view in seen.weak:
            for line in known.nonzero()[0]:
                view[line] = np.log(np.maximum(targets[ids[line]], 1.2e-38))
        check(ran, reference(seen, batch))
        rates.append(known.mean())
        assert ran.losses["refined_rate"] == pytest.approx(rates[-1], abs=1e-6)
        table |= dict(zip(ids, means, strict=True))
        if step in (2, 4, 6, 8):  # after steps 3, 5, 7 and 9
            rows = sorted(table)
            found = aligned(np.stack([table[row] for row in rows]), len(rows) * SHARES, 1.5, 4)
            targets = dict(zip(rows, found, strict=True))
    assert rates[:3] == [0, 0, 0]
    assert 0 < rates[3] < 1
    state = algorithm.state_dict()
    assert state["darp.step"] == 9
    held = state["darp.refined"].numpy()
    assert sorted(held.sum(axis=1).nonzero()[0]) == sorted(targets)
    for row, expected in targets.items():
        np.testing.assert_allclose(held[row], expected, rtol=1e-3, atol=1e-6)


def test_darp_goes_on_with_other_ranks_from_its_state() -> None:
    def make() -> Algorithm:
        return told(DARP(MAKERS["freematch"](), CLASSES, warmup_steps=2, every=2))

    whole, first, second = make(), make(), make()
    for step in range(8):
        batch = batch_of(whole, step)
        expected = run(whole, batch)
        part, ranks = (first, 2) if step < 5 else (second, 4)
        if step == 5:
            second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
        found = run(part, batch, ranks)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert (found.losses["refined_rate"] > 0) == (step > 1)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    state = second.state_dict()
    with pytest.raises(KeyError, match=r"darp\.refined"):
        second.load_state_dict({k: v for k, v in state.items() if k != "darp.refined"})


def test_darp_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="PseudoLabel makes none from weak views"):
        build_algorithm(components("algorithm")["pseudo_label"](), [DARPConfig()], CLASSES)
    with pytest.raises(ValidationError, match="must be positive for every class"):
        DARPConfig(distribution=[0.5, 0.5, 0.0])
    algorithm = DARPConfig(distribution=[2, 1, 1]).build(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="distribution: 3 numbers for 5 classes"):
        run(algorithm, global_batch(algorithm, 0))
    missing = DARP(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="DARP needs to know how many labelled rows"):
        run(missing, global_batch(missing, 0))


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
