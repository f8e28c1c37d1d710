"""Several labels and numbers: every algorithm that can do them, against float64 formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpdist.algorithms import (
    ICT,
    VAT,
    Algorithm,
    AlgorithmConfig,
    Classification,
    EntropyMinimization,
    FixMatch,
    FreeMatch,
    MeanTeacher,
    Multilabel,
    PiModel,
    PseudoLabel,
    Regression,
    Supervised,
    Task,
    TemporalEnsembling,
)
from hpdist.algorithms.addons.base import build_algorithm
from hpdist.algorithms.addons.logit_adjustment import LogitAdjustmentConfig
from hpdist.algorithms.addons.reconstruction import ReconstructionConfig
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.algorithms.supervised import SupervisedConfig
from hpdist.config.component import components
from hpdist.errors import ConfigError
from tests.support.algorithm_runs import FEATURES, GlobalBatch, Ran, global_batch, run

CLASSES, LABELED = 5, 8
TAU = 0.8
UNUSABLE = (2, 11)


def logistic(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def binary(p: Tensor, y: Tensor) -> Tensor:
    """-y log p - (1 - y) log(1 - p), 0 log 0 being 0."""
    return -(torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p))


class Formulas:
    """What a task means, in float64: all that the references below are made of."""

    def __init__(self, task: str) -> None:
        self.several = task == "multilabel"

    def predictions(self, z: Tensor) -> Tensor:
        return logistic(z) if self.several else z

    def supervised(self, z: Tensor, y: Tensor) -> Tensor:
        losses = binary(logistic(z), y) if self.several else (z - y) ** 2
        return losses.mean()

    def squared(self, z: Tensor, q: Tensor, rows: Tensor | None = None) -> Tensor:
        errors = ((self.predictions(z) - q) ** 2).mean(dim=1)
        return (errors if rows is None else errors * rows).sum() / len(z)

    def divergence(self, q: Tensor, z: Tensor) -> Tensor:
        if not self.several:
            return ((z - q) ** 2).mean()
        p, q = logistic(z), logistic(q)
        return (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()

    def pseudo(self, z: Tensor, q: Tensor) -> Tensor:
        """Of each class alone: confident enough, and which way."""
        passed = (q >= TAU) | (q <= 1 - TAU)
        assert 0.1 < passed.double().mean() < 0.9
        losses = torch.where(q > 0.5, -logistic(z).log(), -(1 - logistic(z)).log())
        return (losses * passed).mean()


def sigmoid_ramp(step: int) -> float:
    return math.exp(-5 * (1 - min(step / 4, 1)) ** 2)


Reference = Callable[[Formulas, list[Tensor], GlobalBatch, Ran, int], Tensor]


def said(batch: GlobalBatch, model: Tensor) -> Tensor:
    """Of the first weak view, float64."""
    return batch.weak[0][batch.usable].double() @ model.double()


def supervised_only(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    return torch.zeros(())


def pi_model(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    return 3 * sigmoid_ramp(step) * f.squared(z[1], f.predictions(said(b, b.student)))


def mean_teacher(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    return 3 * min(step / 4, 1) * f.squared(z[1], f.predictions(said(b, b.target)))


def ict(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    q = f.predictions(said(b, b.target))
    partners, shares = ran.context["partners"], ran.context["shares"].double()[:, None]
    x = b.weak[0][b.usable].double()
    np.testing.assert_allclose(
        ran.arrays("inputs")[1], shares * x + (1 - shares) * x[partners], rtol=1e-5, atol=1e-6
    )
    return 3 * sigmoid_ramp(step) * f.squared(z[1], shares * q + (1 - shares) * q[partners])


def vat(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    x, w = b.weak[0][b.usable].double(), b.student.double()
    from hpdist.algorithms.positions import BatchPositions

    at = BatchPositions(
        torch.arange(LABELED), b.usable.nonzero()[:, 0], LABELED, 16, seed=7, step=b.step
    )
    d = at.normal("vat", FEATURES).double()
    d = d / d.norm(dim=1, keepdim=True)
    # Of both divergences the gradient to the outputs is a multiple of p' - p.
    g = (f.predictions((x + 0.5 * d) @ w) - f.predictions(x @ w)) @ w.T
    expected = x + 0.7 * g / g.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(ran.arrays("inputs")[1], expected, rtol=1e-3, atol=1e-4)
    loss = 3 * min(step / 4, 1) * f.divergence(x @ w, z[1])
    if f.several:
        p = logistic(z[2])
        loss = loss + 0.3 * binary(p, p).mean()
    return loss


def fixmatch(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    return 3 * f.pseudo(z[1], logistic(said(b, b.student)))


def pseudo_label(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    return 3 * min(step / 4, 1) * f.pseudo(z[1], logistic(z[1].detach()))


def entropy(f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
    p = logistic(z[1])
    return 0.3 * binary(p, p).mean()


class Ensemble:
    """Temporal ensembling's table, for one run."""

    def __init__(self) -> None:
        self.averages = torch.zeros(32, CLASSES).double()
        self.counts = torch.zeros(32).double()

    def __call__(self, f: Formulas, z: list[Tensor], b: GlobalBatch, ran: Ran, step: int) -> Tensor:
        ids = b.ids[b.usable]
        known = self.counts[ids] > 0
        correction = 1 - 0.7 ** self.counts[ids].clamp(min=1)
        loss = f.squared(z[1], self.averages[ids] / correction[:, None], known.double())
        self.averages[ids] = 0.7 * self.averages[ids] + 0.3 * f.predictions(said(b, b.student))
        self.counts[ids] += 1
        return 3 * sigmoid_ramp(step) * loss


BOTH = ("multilabel", "regression")
MAKERS: dict[str, tuple[Callable[[str], Algorithm], Callable[[], Any], tuple[str, ...]]] = {
    "supervised": (lambda _: Supervised(), lambda: supervised_only, BOTH),
    "fully_supervised": (lambda _: Supervised(), lambda: supervised_only, BOTH),
    "pi_model": (lambda _: PiModel(3.0, 4), lambda: pi_model, BOTH),
    "mean_teacher": (lambda _: MeanTeacher(3.0, 4), lambda: mean_teacher, BOTH),
    "ict": (
        lambda _: ICT(unsupervised_weight=3.0, ramp_steps=4, groups=4),
        lambda: ict,
        BOTH,
    ),
    "temporal_ensembling": (
        lambda _: TemporalEnsembling(CLASSES, momentum=0.7, unsupervised_weight=3.0, ramp_steps=4),
        Ensemble,
        BOTH,
    ),
    "vat": (
        lambda task: VAT(
            epsilon=0.7,
            xi=0.5,
            unsupervised_weight=3.0,
            entropy_weight=0.3 if task == "multilabel" else 0.0,
            ramp_steps=4,
        ),
        lambda: vat,
        BOTH,
    ),
    "fixmatch": (lambda _: FixMatch(TAU, 3.0), lambda: fixmatch, BOTH[:1]),
    "pseudo_label": (
        lambda _: PseudoLabel(threshold=TAU, unsupervised_weight=3.0, ramp_steps=4),
        lambda: pseudo_label,
        BOTH[:1],
    ),
    "entropy_minimization": (lambda _: EntropyMinimization(0.3), lambda: entropy, BOTH[:1]),
}
PAIRS = [(name, task) for name, (_, _, tasks) in MAKERS.items() for task in tasks]
TASKS: dict[str, Task] = {"multilabel": Multilabel(), "regression": Regression()}


def made(name: str, task: str) -> Algorithm:
    algorithm = MAKERS[name][0](task)
    algorithm.set_task(TASKS[task])
    return algorithm


def labels_of(task: str, seed: int, rows: int = LABELED) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    drawn = torch.randn(rows, CLASSES, generator=generator)
    return (drawn > 0.3).float() if task == "multilabel" else 2 * drawn


def batch_of(algorithm: Algorithm, task: str, seed: int, **settings: Any) -> GlobalBatch:
    batch = global_batch(algorithm, seed, **settings)
    return replace(batch, labels=labels_of(task, seed, len(batch.labels)))


def test_every_pair_that_is_declared_has_a_reference() -> None:
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    declared = {
        (name, task)
        for name, config in configs.items()
        for task in config(name=name).build(CLASSES).tasks
    }
    elsewhere = ("classification", "detection")  # test_detection.py has those of boxes
    assert {pair for pair in declared if pair[1] not in elsewhere} == set(PAIRS)
    assert {name for name, task in declared if task == "classification"} == set(configs)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_loss_and_gradient_are_those_of_the_formulas(name: str, task: str) -> None:
    algorithm, reference = made(name, task), MAKERS[name][1]()
    formulas, moved = Formulas(task), 0
    for step in range(6):
        unusable = UNUSABLE if step % 2 else ()
        batch = batch_of(algorithm, task, step, unusable=unusable)
        ran = run(algorithm, batch)
        leaves = [part.detach().double().requires_grad_() for part in ran.logits]
        supervised = formulas.supervised(leaves[0], batch.labels.double())
        expected = supervised + reference(formulas, leaves, batch, ran, step)
        gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
        assert ran.losses["supervised_loss"] == pytest.approx(supervised.item(), rel=1e-5)
        assert ran.losses["loss"] == pytest.approx(expected.item(), rel=1e-4)
        for found, wanted in zip(ran.arrays("gradients"), gradients, strict=True):
            wanted_ = np.zeros_like(found) if wanted is None else wanted.numpy()
            np.testing.assert_allclose(found, wanted_, rtol=2e-3, atol=1e-6)
        moved += sum(bool(part.any()) for part in ran.arrays("gradients")[1:])
    assert moved >= 4 or name.endswith("supervised")


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_slices_of_the_global_batch_add_up(name: str, task: str) -> None:
    whole, cut = made(name, task), made(name, task)
    for step in range(4):
        batch = batch_of(whole, task, step, unusable=UNUSABLE)
        one, four = run(whole, batch), run(cut, batch, ranks=4)
        assert four.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-8)
        for a, b in zip(one.arrays("gradients"), four.arrays("gradients"), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "task"), PAIRS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([4, 8]),
    usable=st.sampled_from(["none", "one", "all"]),
    labels=st.sampled_from(["none", "all", "far"]),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
)
def test_degenerate_batches_stay_finite(
    name: str, task: str, rows: int, usable: str, labels: str, scale: float
) -> None:
    algorithm = made(name, task)
    none, one = range(16), range(1, 16)
    unusable = {"none": none, "one": one, "all": ()}[usable]
    batch = batch_of(algorithm, task, rows, labeled=rows, unusable=tuple(unusable))
    value = {"none": 0.0, "all": 1.0, "far": 1.0 if task == "multilabel" else 1e4}[labels]
    batch = replace(
        batch,
        labels=torch.full_like(batch.labels, value),
        student=batch.student * scale,
        target=batch.target * scale,
    )
    for _ in range(2):
        ran = run(algorithm, batch)
        assert all(math.isfinite(value) for value in ran.losses.values())
        assert all(np.isfinite(part).all() for part in ran.arrays("gradients"))
        if usable == "none":
            assert ran.losses["unsupervised_loss"] == 0


def test_pseudo_labels_of_several_classes_are_decided_one_by_one() -> None:
    task = Multilabel()
    p = torch.tensor([[0.99, 0.5, 0.02], [0.7, 0.3, 0.96]])
    mask, labels = task.pseudo_labels(p.logit(), 0.95)
    assert mask.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert labels.tolist() == [[1, 0, 0], [1, 0, 1]]
    algorithm = made("fixmatch", "multilabel")
    ran = run(algorithm, batch_of(algorithm, "multilabel", 0))
    assert 0 < ran.losses["mask_rate"] < 1


def test_an_algorithm_without_a_meaning_for_a_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"FreeMatch .* multilabel, .*, only .* classif"):
        FreeMatch(CLASSES).set_task(Multilabel())
    with pytest.raises(ConfigError, match=r"FixMatch has no meaning for regression"):
        build_algorithm(FixMatchConfig(), task=Regression())
    with pytest.raises(ConfigError, match=r"LogitAdjustment has no meaning for multilabel"):
        build_algorithm(FixMatchConfig(), [LogitAdjustmentConfig()], task=Multilabel())
    with pytest.raises(ConfigError, match=r"regression has no entropy.*algorithm.entropy_weight"):
        VAT().set_task(Regression())


@pytest.mark.parametrize("task", [Classification(), Multilabel(), Regression()])
def test_reconstruction_goes_around_any_task(task: Task) -> None:
    algorithm = build_algorithm(SupervisedConfig(), [ReconstructionConfig()], CLASSES, task=task)
    assert algorithm.task is task
    assert algorithm.base.task is task  # type: ignore[attr-defined]
