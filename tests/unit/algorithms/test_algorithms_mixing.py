"""Beta draws, partners and mixed rows, and the algorithms whose whole point they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import ICT, LogitAdjustment, MixMatch, ReMixMatch
from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.parts.mixing import (
    BETA_NUMBERS,
    Mixing,
    beta,
    check_group_sizes,
    choose_groups,
    draw_mixing,
    draw_partners,
)
from hpdist.algorithms.positions import BatchPositions
from hpdist.config.component import components
from hpdist.data.random import stream_id, uniform
from hpdist.errors import ConfigError
from hpdist.train import config as configuration
from hpdist.train.checks import divide_batch
from hpdist.train.compose import compose
from tests.support.algorithm_runs import (
    GlobalBatch,
    Ran,
    check_rotation,
    cross_entropy,
    global_batch,
    run,
    softmax,
    squared_error,
)

DRAWS = 40_000


def draws(a: float, b: float) -> np.ndarray:
    numbers = uniform(3, stream_id("test"), 0, torch.arange(DRAWS), BETA_NUMBERS)
    return np.sort(beta(numbers, a, b).double().numpy())


def distribution(a: float, b: float, x: np.ndarray) -> np.ndarray:
    """P(Beta(a, b) <= x), summed over the density in theta, where x = sin(theta)^2."""
    theta = (np.arange(400_000) + 0.5) * (math.pi / 2 / 400_000)
    log = (2 * a - 1) * np.log(np.sin(theta)) + (2 * b - 1) * np.log(np.cos(theta))
    total = np.cumsum(np.exp(log - log.max()))
    return np.interp(np.arcsin(np.sqrt(x)), theta, total / total[-1])


@pytest.mark.parametrize("a", [0.1, 0.5, 0.75, 1.0, 16.0])
@pytest.mark.parametrize("b", [None, 2.0])
def test_beta_draws_are_beta_distributed(a: float, b: float | None) -> None:
    b = b or a
    found = draws(a, b)
    assert found.min() >= 0
    assert found.max() <= 1
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert found.mean() == pytest.approx(mean, abs=4.5 * math.sqrt(variance / DRAWS))
    assert found.var() == pytest.approx(variance, rel=0.05)
    if a >= 0.5:  # sin^2 resolves the density at 0
        steps = (np.arange(DRAWS) + 0.5) / DRAWS
        assert np.abs(distribution(a, b, found) - steps).max() < 1.95 / math.sqrt(DRAWS)  # 0.1 %


def test_known_quantiles_of_a_beta_with_its_mass_at_the_ends() -> None:
    # Beta(a, a) is symmetric, and P(x <= q) = q^a / (a B(a, a)) (1 + a (1 - a) q / (a + 1) + ...).
    a, found = 0.1, draws(0.1, 0.1)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    for q in (1e-12, 1e-6, 1e-3):
        share = q**a / (a * whole) * (1 + a * (1 - a) * q / (a + 1))
        bound = 4.5 * math.sqrt(share / DRAWS)
        assert np.mean(found <= q) == pytest.approx(share, abs=bound)
        if q >= 1e-6:  # 1 - 1e-12 is 1 in fp32
            assert np.mean(found >= 1 - q) == pytest.approx(share, abs=bound)


def test_extreme_numbers_give_numbers() -> None:
    for value in (0.0, 1 - 2.0**-24):
        for a in (1e-3, 0.1, 1.0, 16.0):
            found = beta(torch.full((2, BETA_NUMBERS), value), a, a)
            assert torch.equal(found, torch.full((2,), 0.5))


def test_a_draw_depends_on_its_own_numbers_alone() -> None:
    numbers = uniform(0, 1, 2, torch.arange(50), BETA_NUMBERS)
    whole = beta(numbers, 0.75, 0.75)
    assert torch.equal(torch.cat([beta(part, 0.75, 0.75) for part in numbers.split(7)]), whole)
    assert whole.unique().numel() == 50


def test_partners_permute_each_group() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 3, 0, 1, 3, 3, 4])
    seen = set()
    for step in range(60):
        found = draw_partners(groups, uniform(0, 1, step, torch.arange(len(groups)), 1)[:, 0])
        assert torch.equal(groups[found], groups)
        assert found.sort().values.tolist() == list(range(len(groups)))
        seen.add(tuple(found[[0, 1, 2, 6]].tolist()))
    assert len(seen) > 20  # of the 24 orders of four rows


def test_equal_noise_is_no_matter() -> None:
    groups = torch.tensor([1, 0, 1])
    assert draw_partners(groups, torch.zeros(3)).tolist() == [0, 1, 2]


def test_mixing_by_the_formula() -> None:
    mixing = Mixing(torch.tensor([2, 1, 0]), torch.tensor([0.25, 0.5, 1.0]))
    rows = torch.arange(12.0).view(3, 2, 2)
    expected = torch.stack([0.25 * rows[0] + 0.75 * rows[2], rows[1], rows[2]])
    torch.testing.assert_close(mixing(rows), expected)
    assert mixing.own_most().shares.tolist() == [0.75, 0.5, 1.0]
    assert mixing(rows.half()).dtype == torch.float16


def places(ranks: int, rank: int, usable: list[int], step: int = 0) -> BatchPositions:
    labeled, unlabeled = 8 // ranks, 16 // ranks
    here = [u for u in usable if rank * unlabeled <= u < (rank + 1) * unlabeled]
    x = torch.arange(rank * labeled, (rank + 1) * labeled)
    return BatchPositions(x, torch.tensor(here, dtype=torch.int64), 8, 16, seed=5, step=step)


def drawn(ranks: int, usable: list[int], step: int = 0) -> list[Tensor]:
    """Mixed names of rows of the whole batch: labelled ones, then two unlabelled views."""
    parts: list[list[Tensor]] = []
    for rank in range(ranks):
        at = places(ranks, rank, usable, step)
        names = [at.labeled, 100 + at.unlabeled, 200 + at.unlabeled]
        mixing = draw_mixing(at, "test", 0.75, 4, labeled=1, unlabeled=2)
        rows = torch.cat(names)
        mixed = torch.stack([rows.double(), rows[mixing.partners], mixing.shares], dim=1)
        parts.append(list(mixed.split([len(part) for part in names])))
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


@pytest.mark.parametrize("usable", [list(range(16)), [0, 3, 4, 5, 9, 10, 15], [7], []])
def test_partners_and_shares_do_not_depend_on_ranks(usable: list[int]) -> None:
    whole = drawn(1, usable)
    for ranks in (2, 4):
        for one, many in zip(whole, drawn(ranks, usable), strict=True):
            assert torch.equal(one, many)
    if len(usable) == 16:
        assert (torch.cat(whole)[:, 0] // 100 != torch.cat(whole)[:, 1] // 100).any()
        assert torch.cat(whole)[:, 2].unique().numel() == 8 + 2 * 16  # views draw apart
        assert not torch.equal(torch.cat(drawn(1, usable, step=1)), torch.cat(whole))


def test_a_group_that_is_cut_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"within 2 groups .* 4 slices"):
        draw_mixing(places(4, 1, [5]), "test", 1.0, 2, unlabeled=1)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "slices", "groups"),
    [
        (64, 448, 1, 8),
        (64, 448, 8, 8),
        (512, 3584, 2, 8),
        (8, 8, 1, 1),
        (16, 48, 2, 2),
        (32, 224, 4, 4),
        (24, 48, 1, 2),
        (7, 49, 1, 1),
        (2, 448, 1, 1),
        (64, 448, 16, 16),  # each rank a group of its own: one cannot be larger
        (8, 8, 2, 2),
        (30, 90, 3, 3),
    ],
)
def test_groups_follow_the_global_batch(
    labeled: int, unlabeled: int, slices: int, groups: int
) -> None:
    assert choose_groups(labeled, unlabeled, slices) == groups
    sizes = {"labeled": labeled, "unlabeled": unlabeled}
    told = check_group_sizes("MixMatch", "auto", sizes, slices, ("labeled", "unlabeled"))
    few = min(labeled, unlabeled) // groups < 8
    assert (told is not None) == (few or groups != choose_groups(labeled, unlabeled))
    assert ("hardly any" in (told or "")) == few


def test_all_rows_of_a_small_batch_are_mixed_with_one_another() -> None:
    """8 + 8 rows are one group, where eight groups would pair a row with itself in half of all."""
    alone = []
    for groups in ("auto", 8):
        same = 0
        for step in range(40):
            at = BatchPositions(torch.arange(8), torch.arange(8), 8, 8, seed=5, step=step)
            mixing = draw_mixing(at, "test", 0.75, groups, labeled=1, unlabeled=1)
            same += int((mixing.partners == torch.arange(16)).sum())
        alone.append(same / (40 * 16))
    assert alone[0] == pytest.approx(1 / 16, abs=0.03)
    assert alone[1] == pytest.approx(1 / 2, abs=0.06)


def test_too_few_rows_are_refused_before_the_training() -> None:
    settings = {
        "model": {"name": "cnn"},
        "data": {"labeled": {"path": "x"}, "unlabeled": {"path": "x"}},
        "batch": {"labeled": 4, "unlabeled": 8},
        "algorithm": {"name": "mixmatch"},
        "steps": 1,
    }
    config = configuration.parse(settings)
    assert divide_batch(config.batch, compose(config), 2) == 1
    with pytest.raises(ConfigError, match=r"4 groups .* 1 labelled .* raise batch\.labeled to 32"):
        divide_batch(config.batch, compose(config), 4)
    own = configuration.parse(settings | {"algorithm": {"name": "mixmatch", "groups": 3}})
    with pytest.raises(ConfigError, match=r"within 3 groups .* 2 slices"):
        divide_batch(own.batch, compose(own), 2)
    with pytest.raises(ConfigError, match=r"algorithm\.groups"):
        configuration.parse(settings | {"algorithm": {"name": "ict", "groups": 0}})


def test_an_add_on_mixes_what_the_algorithm_inside_mixes() -> None:
    inner = ICT()
    around = LogitAdjustment(inner)
    assert (around.groups, around.mixed) == (inner.groups, inner.mixed) == ("auto", ("unlabeled",))
    assert around.changes_inputs


CLASSES = 5
MAKERS: dict[str, Callable[[int], Algorithm]] = {
    "mixmatch": lambda classes: MixMatch(ramp_steps=3, groups=4),
    "remixmatch": lambda classes: ReMixMatch(classes, ramp_steps=3, groups=4, strong_views=2),
}


def mixed(
    batch: GlobalBatch,
    name: str,
    alpha: float,
    groups: int,
    unlabeled: int,
    parts: list[np.ndarray],
) -> np.ndarray:
    """Labelled and unlabelled parts, mixed as the draws say; MixUp of the MixMatch paper."""
    usable = batch.usable.nonzero().flatten()
    x = torch.arange(len(batch.labels))
    at = BatchPositions(x, usable, len(x), len(batch.ids), seed=7, step=batch.step)
    mixing = draw_mixing(at, name, alpha, groups, labeled=1, unlabeled=unlabeled)
    rows, share = np.concatenate(parts), mixing.shares.double().numpy()[:, None]
    share = np.maximum(share, 1 - share)
    return share * rows + (1 - share) * rows[mixing.partners.numpy()]


def views_of(batch: GlobalBatch, views: list[Tensor]) -> list[np.ndarray]:
    return [view[batch.usable].flatten(1).double().numpy() for view in views]


def check(ran: Ran, part: int, inputs: np.ndarray, slopes: np.ndarray) -> None:
    seen = ran.arrays("inputs")[part].reshape(inputs.shape)
    np.testing.assert_allclose(seen, inputs, atol=1e-5)
    np.testing.assert_allclose(ran.arrays("gradients")[part], slopes, rtol=2e-3, atol=1e-7)


def check_flow(ran: Ran, parts: int, step: int) -> None:
    """Every part has a gradient, save in the first step, where only the labelled one has."""
    flows = [bool(part.abs().sum() > 0) for part in ran.gradients]
    assert flows == [True, *[step > 0] * (parts - 1)]


@pytest.mark.parametrize("unusable", [(), (1, 4, 5, 6, 7)])
def test_mixmatch_over_several_steps(unusable: tuple[int, ...]) -> None:
    options = {"temperature": 0.4, "alpha": 0.6, "unsupervised_weight": 9.0}
    algorithm = MixMatch(**options, ramp_steps=3, groups=4)
    for step in range(5):
        batch = global_batch(algorithm, step, unusable=unusable)
        ran = run(algorithm, batch)
        model = batch.student.double().numpy()
        u1, u2 = views_of(batch, batch.weak)
        guess = (softmax(u1 @ model) + softmax(u2 @ model)) / 2
        q = guess ** (1 / 0.4)
        q /= q.sum(axis=1, keepdims=True)
        one_hot, x = np.eye(CLASSES)[batch.labels.numpy()], batch.labeled.double().numpy()
        rows = mixed(batch, "mixmatch", 0.6, 4, 2, [x, u1, u2])
        labels = mixed(batch, "mixmatch", 0.6, 4, 2, [one_hot, q, q])
        n = len(u1)
        ends = [8, 8 + n]
        (rx, r1, r2), (lx, l1, l2) = np.split(rows, ends), np.split(labels, ends)
        losses, slopes = cross_entropy(rx @ model, lx)
        check(ran, 0, rx, slopes / 8)
        assert ran.losses["supervised_loss"] == pytest.approx(losses.mean(), rel=1e-4)
        weight, total = 9.0 * min(step / 3, 1), 0.0
        for part, (row, label) in enumerate(((r1, l1), (r2, l2)), start=1):
            errors, slopes = squared_error(row @ model, label)
            check(ran, part, row, weight * slopes / (2 * n))
            total += errors.sum() / (2 * n)
        assert ran.losses["unsupervised_loss"] == pytest.approx(total, rel=1e-4)
        loss = losses.mean() + weight * total
        assert ran.losses["loss"] == pytest.approx(loss, rel=1e-4)
        check_flow(ran, 3, step)


@pytest.mark.parametrize("average", [{}, {"window": 2}, {"momentum": 0.3}], ids=str)
@pytest.mark.parametrize("unusable", [(), (0, 9, 12, 13, 14, 15)])
def test_remixmatch_over_several_steps(unusable: tuple[int, ...], average: dict[str, Any]) -> None:
    weights = {"unsupervised_weight": 2.0, "strong_weight": 0.7, "rotation_weight": 0.3}
    options = {"temperature": 0.6, "alpha": 0.8, **average}
    kept = average.get("momentum", 0.999)
    algorithm = ReMixMatch(CLASSES, **weights, **options, ramp_steps=3, strong_views=3, groups=4)
    labels_average = predictions_average = np.full(CLASSES, 1 / CLASSES)
    means = [predictions_average] * average.get("window", 128)
    for step in range(5):
        batch = global_batch(algorithm, step, unusable=unusable)
        ran = run(algorithm, batch)
        model = batch.student.double().numpy()
        (weak,) = views_of(batch, batch.weak)
        strong = views_of(batch, batch.strong)
        said = softmax(weak @ model)
        q = said * (labels_average + 1e-6) / (predictions_average + 1e-6)
        q = (q / q.sum(axis=1, keepdims=True)) ** (1 / 0.6)
        q /= q.sum(axis=1, keepdims=True)
        one_hot = np.eye(CLASSES)[batch.labels.numpy()]
        x = batch.strong_labeled[0].flatten(1).double().numpy()
        rows = mixed(batch, "remixmatch", 0.8, 4, 4, [x, weak, *strong])
        labels = mixed(batch, "remixmatch", 0.8, 4, 4, [one_hot, *[q] * 4])
        n, ramp = len(weak), min(step / 3, 1)
        losses, slopes = cross_entropy(rows[:8] @ model, labels[:8])
        check(ran, 0, rows[:8], slopes / 8)
        total = 0.0
        for part in range(4):
            inside = slice(8 + part * n, 8 + (part + 1) * n)
            errors, slopes = cross_entropy(rows[inside] @ model, labels[inside])
            check(ran, 1 + part, rows[inside], ramp * 2.0 * slopes / (4 * n))
            total += errors.sum() / (4 * n)
        errors, slopes = cross_entropy(strong[0] @ model, q)
        check(ran, 5, strong[0], ramp * 0.7 * slopes / n)
        turned, turn_errors = check_rotation(ran, batch, "remixmatch", batch.strong[0], 0.3)
        check(ran, 6, turned, np.zeros_like(slopes))
        ran.gradients.pop()
        check_flow(ran, 6, step)
        assert ran.losses["unsupervised_loss"] == pytest.approx(total, rel=1e-4)
        assert ran.losses["rotation_loss"] == pytest.approx(0.3 * turn_errors.mean(), rel=1e-4)
        assert ran.losses["strong_loss"] == pytest.approx(ramp * 0.7 * errors.mean(), rel=1e-4)
        loss = losses.mean() + ramp * (2.0 * total + 0.7 * errors.mean()) + 0.3 * turn_errors.mean()
        assert ran.losses["loss"] == pytest.approx(loss, rel=1e-4)
        labels_average = kept * labels_average + (1 - kept) * one_hot.mean(axis=0)
        means = [*means[1:], said.mean(axis=0)]
        state = algorithm.state_dict()
        if "momentum" in average:
            predictions_average = 0.3 * predictions_average + 0.7 * means[-1]
            held = state["predictions"]
        else:
            predictions_average = sum(means) / len(means)
            held = state["recent_predictions"].mean(dim=0)
        np.testing.assert_allclose(state["labels"].numpy(), labels_average, rtol=1e-5)
        np.testing.assert_allclose(held.numpy(), predictions_average, rtol=1e-5)


CHANGES: list[tuple[str, dict[str, float]]] = [
    *(("mixmatch", {key: value}) for key, value in [("temperature", 0.8), ("alpha", 3.0)]),
    *(("mixmatch", {key: 2}) for key in ("unsupervised_weight", "groups")),
    *(("remixmatch", {key: value}) for key, value in [("temperature", 0.8), ("alpha", 3.0)]),
    *(("remixmatch", {key: 2}) for key in ("unsupervised_weight", "groups", "strong_weight")),
    ("remixmatch", {"momentum": 0.2}),
    ("remixmatch", {"window": 1}),
    ("remixmatch", {"rotation_weight": 2.0}),
    ("remixmatch", {"strong_views": 3}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_every_option_changes_the_loss(name: str, change: dict[str, float]) -> None:
    config = components("algorithm")[name]
    plain = config(name=name, ramp=0).build(CLASSES)
    other = config(name=name, ramp=0, **change).build(CLASSES)
    batches = [global_batch(plain, step) for step in range(3)]
    wider = [global_batch(other, step) for step in range(3)]
    ran = [(run(plain, a), run(other, b)) for a, b in zip(batches, wider, strict=True)]
    assert max(abs(one.losses["loss"] - two.losses["loss"]) for one, two in ran) > 1e-3
    assert config(name=name, ramp=0.5).build(CLASSES, steps=30).ramp_steps == 15
