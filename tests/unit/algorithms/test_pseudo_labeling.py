"""`targets` and `burn_in`: whose predictions teach, and from which applied step on."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from hpdist.algorithms import AlgorithmConfig, FixMatch, ReFixMatch
from hpdist.algorithms.addons.base import build_algorithm
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.config.component import components
from tests.support.algorithm_batches import softmax
from tests.support.algorithm_runs import cross_entropy, global_batch, run
from tests.support.catalogue import SETTINGS

CONFIGS = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
NAMES = [name for name, config in CONFIGS.items() if "burn_in" in config.model_fields]


def build(name: str, **options: object) -> PseudoLabeling:
    config = CONFIGS[name](name=name, **SETTINGS.get(name, {}) | options)
    algorithm = config.build(5, steps=40)
    assert isinstance(algorithm, PseudoLabeling)
    algorithm.rows = 32
    algorithm.class_counts = torch.ones(5)
    return algorithm


def test_who_has_them() -> None:
    without = {"comatch", "dash", "mixmatch", "noisy_student", "remixmatch", "simmatch"}
    assert {"fixmatch", "flexmatch", "freematch", "softmatch", "uda"} < set(NAMES)
    assert not without & set(NAMES)


@pytest.mark.parametrize("targets", ["student", "teacher"])
def test_fixmatch_from_its_formula(targets: str) -> None:
    """L_x + 1[t >= T] lambda mean_b 1[max q_b >= tau] H(argmax q_b, p_b), q_b of whom it says."""
    threshold, weight, burn_in = 0.6, 0.7, 2
    algorithm = FixMatch(threshold, weight, targets=targets, burn_in=burn_in)  # type: ignore[arg-type]
    for step in range(4):
        batch = global_batch(algorithm, step)
        other = torch.randn(batch.student.shape, generator=torch.Generator().manual_seed(step))
        batch = replace(batch, target=other)
        ran = run(algorithm, batch)
        model = batch.student if targets == "student" else other
        q = softmax((batch.weak[0] @ model).double().numpy())
        labels, passed = q.argmax(axis=1), q.max(axis=1) >= threshold
        labeled, strong = ran.arrays("logits")
        one_hot = np.eye(5)
        x_losses, x_gradients = cross_entropy(labeled, one_hot[batch.labels.numpy()])
        u_losses, u_gradients = cross_entropy(strong, one_hot[labels])
        unsupervised = (u_losses * passed).mean()
        on = weight * (step >= burn_in)
        assert ran.losses["unsupervised_loss"] == pytest.approx(unsupervised, rel=1e-5)
        assert ran.losses["mask_rate"] == pytest.approx(passed.mean())
        assert ran.losses["loss"] == pytest.approx(x_losses.mean() + on * unsupervised, rel=1e-5)
        x_found, u_found = ran.arrays("gradients")
        np.testing.assert_allclose(x_found, x_gradients / len(labeled), atol=1e-6)
        expected = on * passed[:, None] * u_gradients / len(strong)
        np.testing.assert_allclose(u_found, expected, atol=1e-6)
        assert np.any(u_found) == (step >= burn_in)


@pytest.mark.parametrize("name", NAMES)
def test_only_labels_train_before(name: str) -> None:
    """Every term but the supervised one is off, and the statistics are those without a burn-in."""
    algorithm, other = build(name, burn_in=2), build(name)
    for step in range(4):
        batch = global_batch(algorithm, step)
        losses, expected = run(algorithm, batch).losses, run(other, batch).losses
        assert losses["supervised_loss"] == expected["supervised_loss"]
        assert losses.get("mask_rate") == expected.get("mask_rate")
        if step < 2:
            assert losses["loss"] == losses["supervised_loss"]
        else:
            assert losses == expected
            assert step < 3 or losses["loss"] != losses["supervised_loss"]
        state = algorithm.state_dict()
        assert int(state.pop("burn_in")) == step + 1
        for key, value in other.state_dict().items():
            assert torch.equal(state.pop(key), value), key
        assert not state


@pytest.mark.parametrize("name", NAMES)
def test_ranks_do_not_matter(name: str) -> None:
    options = {"burn_in": 1, "targets": "teacher"}
    algorithms = {ranks: build(name, **options) for ranks in (1, 2, 4)}
    for step in range(3):
        batch = global_batch(algorithms[1], step, unusable=(3,))
        expected, *others = (run(a, batch, ranks).losses for ranks, a in algorithms.items())
        for found in others:
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_skipped_step_does_not_count() -> None:
    algorithm = FixMatch(burn_in=2)
    for commit, count in ((True, 1), (False, 1), (True, 2)):
        run(algorithm, global_batch(algorithm), commit=commit)
        assert int(algorithm.state["burn_in"]) == count


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_where_it_stopped(name: str) -> None:
    """A new object with the saved state is as far in its burn-in as the old one."""
    algorithm, later = build(name, burn_in=3), build(name, burn_in=3)
    for step in range(2):
        run(algorithm, global_batch(algorithm, step))
    later.load_state_dict(algorithm.state_dict())
    for step in range(2, 5):
        batch = global_batch(algorithm, step)
        losses = run(later, batch).losses
        assert losses == run(algorithm, batch).losses
        assert (losses["loss"] == losses["supervised_loss"]) == (step < 3)


@pytest.mark.parametrize("name", NAMES)
def test_they_cost_nothing_by_default(name: str) -> None:
    algorithm = build(name)
    assert not algorithm.views.teacher
    assert "burn_in" not in algorithm.state_dict()
    assert build(name, targets="teacher").views == replace(algorithm.views, teacher=True)


def test_an_addon_asks_for_the_teacher_too() -> None:
    addon = components("addon")["debiaspl"]()
    config = CONFIGS["fixmatch"](name="fixmatch", targets="teacher", burn_in=1)  # type: ignore[call-arg]
    algorithm = build_algorithm(config, [addon], 5)  # type: ignore[list-item]
    assert algorithm.views.teacher
    run(algorithm, global_batch(algorithm))
    assert int(algorithm.state_dict()["burn_in"]) == 1


def test_a_bare_refixmatch_takes_them() -> None:
    assert ReFixMatch(burn_in=3, targets="teacher").views.teacher
