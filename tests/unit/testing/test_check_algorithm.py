"""The check of an algorithm: the catalogue passes it, and a toy broken in one way does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms import (
    AddOnConfig,
    Algorithm,
    AlgorithmConfig,
    FixMatch,
    LossTerms,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.exchange import StudentInputs, Sums
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.config.component import component_names, components
from hpdist.errors import ConfigError
from hpdist.tasks.base import PREDICTIONS, PSEUDO_LABELS, Task
from hpdist.testing import AlgorithmError, check_algorithm
from tests.support.catalogue import ADDON_SETTINGS, INSIDE, SETTINGS
from tests.support.documents import files


class Sound(Algorithm):
    """FixMatch for rows that are surer than the average so far: nothing is wrong with it."""

    views = Views(weak=1, strong=1)

    def __init__(self) -> None:
        super().__init__()
        self.state = {"confidence": torch.zeros(())}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        return {"confidence": weak.probabilities.amax(dim=1).sum()}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        mean = sums["confidence"] / unlabeled_rows
        self.pending = {"confidence": self.state["confidence"].lerp(mean, 0.5)}

    def mask(self, outputs: StudentOutputs) -> Tensor:
        assert outputs.weak is not None
        return (outputs.weak.probabilities.amax(dim=1) >= self.pending["confidence"]).float()

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        assert outputs.weak is not None
        labels = outputs.weak.logits.argmax(dim=1)
        losses = masked_pseudo_label_loss(outputs, self.mask(outputs), labels)
        return LossTerms(supervised_loss(outputs), losses)


class MeanOfItsOwnRows(Sound):
    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        terms = super().loss(outputs, student_sums)
        rows = max(len(outputs.strong[0]), 1)
        return LossTerms(terms.supervised, terms.unsupervised * outputs.unlabeled_rows / rows)


class ThresholdOfItsOwnRows(Sound):
    def mask(self, outputs: StudentOutputs) -> Tensor:
        assert outputs.weak is not None
        confidence = outputs.weak.probabilities.amax(dim=1)
        return (confidence >= confidence.sum() / max(len(confidence), 1)).float()


class NoiseOfItsOwn(Sound):
    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(inputs.strong[0].shape, generator=generator)
        return replace(inputs, strong=(inputs.strong[0] + noise,))


class MovesItsStateAtOnce(Sound):
    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        super().observe(sums, unlabeled_rows)
        self.state["confidence"].copy_(self.pending["confidence"])


class CountsAttempts(Sound):
    steps = 0

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        super().observe(sums, unlabeled_rows)
        self.steps += 1

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        terms = super().loss(outputs, student_sums)
        return LossTerms(terms.supervised, terms.unsupervised, 1.0 / self.steps)


class KeepsWhatIsNotFinite(Sound):
    def commit(self) -> None:
        super().commit()
        self.state = {"confidence": self.latest}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        super().observe(sums, unlabeled_rows)
        self.latest = self.pending["confidence"]


class EntropyOfNoRow(Sound):
    """Its extra term is -log of the student's mean confidence, which no row makes infinite."""

    @property
    def uses_student_statistics(self) -> bool:
        return True

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        return {"sure": outputs.strong[0].softmax(dim=1).amax(dim=1).sum()}

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        terms = super().loss(outputs, student_sums)
        term = -(student_sums["sure"] / outputs.unlabeled_rows).log()
        return LossTerms(terms.supervised, terms.unsupervised, global_extras={"sureness": term})


class DoesNotSayThatItSums(EntropyOfNoRow):
    @property
    def uses_student_statistics(self) -> bool:
        return False


class ForgetsToSave(Sound):
    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Any, saved: Any = None) -> None:
        if state:
            raise KeyError(f"state holds {sorted(state)}")


class LoadsAnything(Sound):
    def load_state_dict(self, state: Any, saved: Any = None) -> None:
        super().load_state_dict({"confidence": state["confidence"]})


class HalfPrecision(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"confidence": torch.zeros((), dtype=torch.bfloat16)}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        mean = (sums["confidence"] / unlabeled_rows).bfloat16()
        self.pending = {"confidence": self.state["confidence"].lerp(mean, 0.5)}


class LearnsNothing(Sound):
    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        terms = super().loss(outputs, student_sums)
        return LossTerms(terms.supervised, terms.unsupervised.detach())


class Random(Sound):
    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        terms = super().loss(outputs, student_sums)
        return LossTerms(terms.supervised, terms.unsupervised, float(torch.rand(())))


class LearnsItsTargets(Sound):
    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        assert outputs.weak is not None
        targets = outputs.weak.logits.requires_grad_().softmax(dim=1)
        losses = F.cross_entropy(outputs.strong[0], targets, reduction="sum")
        return LossTerms(supervised_loss(outputs), losses / outputs.unlabeled_rows)


class SharpensInPlace(Sound):
    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        assert outputs.weak is not None
        outputs.weak.logits.mul_(2)
        return super().loss(outputs, student_sums)


BROKEN: list[tuple[Callable[[], Algorithm], str]] = [
    (MeanOfItsOwnRows, "ranks: on 2 ranks the loss is"),
    (ThresholdOfItsOwnRows, "micro batches: in 2 micro-batches the loss is"),
    (NoiseOfItsOwn, "ranks: on 2 ranks the inputs of the strong view 0"),
    (MovesItsStateAtOnce, "skipped step: it changes the state 'confidence'"),
    (CountsAttempts, "skipped step: it changes the loss of the next step"),
    (KeepsWhatIsNotFinite, "not finite: a NaN in a weak view changes the state 'confidence'"),
    (EntropyOfNoRow, "no valid row: a loss is not finite"),
    (DoesNotSayThatItSums, "`uses_student_statistics` is False"),
    (ForgetsToSave, "state: after loading it the loss, unsupervised_loss differs"),
    (LoadsAnything, "state: a state with other names is loaded"),
    (HalfPrecision, "state: confidence is torch.bfloat16"),
    (LearnsNothing, "gradient: none reaches the strong view 0"),
    (Random, "one step: a second call of `loss` gives"),
    (LearnsItsTargets, "one step: needs a gradient into the targets"),
    (SharpensInPlace, "one step: changes the outputs of the weak views"),
]


@pytest.mark.parametrize(("make", "line"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_broken_is_named(make: Callable[[], Algorithm], line: str) -> None:
    with pytest.raises(AlgorithmError) as error:
        check_algorithm(make)
    assert line in str(error.value)
    assert make.__name__ in str(error.value)


def test_a_sound_one_passes_however_it_is_given() -> None:
    check_algorithm(Sound)
    check_algorithm(Sound())
    check_algorithm(FixMatch(0.7), task="multilabel")
    with pytest.raises(ConfigError, match="has no meaning for regression"):
        check_algorithm(Sound, task="regression")


def test_the_documents_algorithm_passes() -> None:
    names: dict[str, Any] = {}
    exec(compile(files()["my_algorithms.py"], "my_algorithms.py", "exec"), names)
    check_algorithm(names["MarginMatch"](momentum=0.5))


ALGORITHMS = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
ADDONS = cast(dict[str, type[AddOnConfig]], components("addon"))
CASES = [
    (name, task) for name, config in ALGORITHMS.items() for task in config(name=name).build(5).tasks
]


@pytest.mark.sampled(rows="name", columns="task", share=0.3)
@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_algorithm_passes(name: str, task: str) -> None:
    options = SETTINGS.get(name, {})
    if (name, task) == ("vat", "regression"):
        options = options | {"entropy_weight": 0.0}  # numbers have no entropy
    check_algorithm(ALGORITHMS[name](name=name, **options), task, run_steps=40)


@pytest.mark.parametrize("name", component_names("addon"))
def test_every_addon_passes(name: str) -> None:
    addon = ADDONS[name](name=name, **ADDON_SETTINGS.get(name, {}))
    inside = ALGORITHMS["fixmatch"](name="fixmatch", **SETTINGS["fixmatch"] | INSIDE.get(name, {}))
    check_algorithm(inside, addons=[addon], run_steps=40)
    check_algorithm(addon)


class ClassAndPlace(Task):
    """A row is of one class and lies somewhere: the model has an output for each."""

    name = "class_and_place"
    headline = "accuracy"
    summarized = ("accuracy",)
    abilities = frozenset({PREDICTIONS, PSEUDO_LABELS})
    outputs = ("logits", "place")

    def losses(self, logits, labels):
        distance = (logits["place"] - labels["place"]).square().sum(dim=(1, 2))
        return F.cross_entropy(logits["logits"], labels["class"], reduction="none") + distance

    def predictions(self, logits):
        return {"logits": logits["logits"].softmax(dim=1), "place": logits["place"]}

    def squared_error(self, logits, targets):
        own = self.predictions(logits)
        return sum((own[n] - targets[n]).square().flatten(1).mean(dim=1) for n in own)

    def pseudo_labels(self, logits, threshold):
        confidence, classes = logits["logits"].softmax(dim=1).max(dim=1)
        return (confidence >= threshold).float(), {"class": classes, "place": logits["place"]}

    def pseudo_label_losses(self, logits, labels, mask):
        return self.losses(logits, labels) * mask

    def example_labels(self, rows, num_classes, generator):
        return {
            "class": torch.randint(num_classes, (rows,), generator=generator),
            "place": torch.randn(rows, 2, 2, generator=generator),
        }

    def example_outputs(self, num_classes):
        return {"logits": (num_classes,), "place": (2, 2)}


class NoPlace(ClassAndPlace):
    def losses(self, logits, labels):
        return F.cross_entropy(logits["logits"], labels["class"], reduction="none")


class Untold(ClassAndPlace):
    example_outputs = Task.example_outputs


@pytest.mark.parametrize("name", ["supervised", "fixmatch", "mean_teacher"])
def test_a_task_of_several_outputs_is_tried_with_all_of_them(name):
    config = components("algorithm")[name](name=name)
    check_algorithm(config, ClassAndPlace())


def test_an_output_that_nothing_trains_is_named():
    with pytest.raises(AlgorithmError, match="none reaches the output place"):
        check_algorithm(components("algorithm")["supervised"](name="supervised"), NoPlace())
    with pytest.raises(ConfigError, match=r"class_and_place must define example_outputs\(\)"):
        check_algorithm(components("algorithm")["supervised"](name="supervised"), Untold())
