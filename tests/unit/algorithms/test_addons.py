"""Add-ons around several algorithms and one another; logit adjustment and DebiasPL in float64."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch

from hpdist.algorithms import (
    Algorithm,
    AlgorithmConfig,
    DebiasPL,
    FixMatch,
    LogitAdjustment,
)
from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.config.component import component_names, components
from hpdist.errors import ConfigError
from tests.support.addon_references import (
    CLASSES,
    COUNTS,
    MAKERS,
    REFERENCES,
    batch_of,
    check,
    said,
    told,
)
from tests.support.algorithm_runs import (
    global_batch,
    run,
    softmax,
)
from tests.support.catalogue import ADDON_SETTINGS, SETTINGS

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
        match=r"LogitAdjustment needs the number .* algorithm.class_counts = torch\.bincount",
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
