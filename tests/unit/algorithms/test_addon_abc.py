"""ABC over several steps, against its formula in float64, and what its head is used for."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import (
    ABC,
    Algorithm,
    AlgorithmConfig,
    FixMatch,
    LossTerms,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.exchange import StudentInputs, Sums
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.positions import BatchPositions
from hpdist.config.component import component_names, components
from hpdist.data.batch import LabeledBatch
from hpdist.errors import ConfigError
from hpdist.evaluate.scoring import evaluate_both
from hpdist.models.with_heads import WithHeads
from tests.support.addon_references import (
    CLASSES,
    MAKERS,
    batch_of,
    told,
)
from tests.support.algorithm_runs import (
    GlobalBatch,
    cross_entropy,
    global_batch,
    run,
    softmax,
)
from tests.support.catalogue import SETTINGS
from tests.support.recipes import digits, make_step, train

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
        places = BatchPositions(
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
        return replace(inputs, extra_inputs=(inputs.labeled,))

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        assert outputs.weak is None
        assert (len(outputs.strong), len(outputs.extra_inputs), len(outputs.student_weak)) == (
            0,
            1,
            1,
        )
        for head in outputs.heads.values():
            assert len(head.extra_inputs) == 1
        term = outputs.extra_inputs[0].sum() + outputs.student_weak[0].sum()
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
    with step.teacher.teacher_weights():
        teacher = expected()
    assert found["loss"] == pytest.approx(teacher[1], rel=1e-4)
    assert teacher[1] != pytest.approx(student[1], rel=1e-4)


def test_abc_needs_to_know_the_labels() -> None:
    algorithm = ABC(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="ABC needs the number of labelled rows"):
        run(algorithm, global_batch(algorithm, 0))
