"""A model of two inputs and two outputs, labels of two parts, and a task that goes by both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms import FixMatch, MeanTeacher, Supervised
from hpdist.algorithms.base import Algorithm
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.structures import index, map_tensors, narrow
from hpdist.data.views.base import IdentityViews
from hpdist.engines import launch
from hpdist.engines.config import LossScale
from hpdist.errors import ConfigError
from hpdist.models.with_heads import with_heads
from hpdist.tasks.base import PREDICTIONS, PSEUDO_LABELS, Task
from hpdist.train.checks import check_model
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import slice_of

ROWS, UNLABELED, CLASSES = 8, 24, 3
SCALE = LossScale(initial=1024.0)
Named = Mapping[str, Tensor]


class ClassAndPlace(Task):
    """A row is of one class and lies somewhere: cross-entropy and squared distance."""

    name = "class_and_place"
    headline = "accuracy"
    abilities = frozenset({PREDICTIONS, PSEUDO_LABELS})
    outputs = ("logits", "place")

    def losses(self, logits: Named, labels: Named) -> Tensor:
        distance = (logits["place"] - labels["place"]).square().sum(dim=1)
        return F.cross_entropy(logits["logits"], labels["class"], reduction="none") + distance

    def predictions(self, logits: Named) -> dict[str, Tensor]:
        return {"logits": logits["logits"].softmax(dim=1), "place": logits["place"]}

    def squared_error(self, logits: Named, targets: Named) -> Tensor:
        own = self.predictions(logits)
        return sum((own[name] - targets[name]).square().mean(dim=1) for name in own)

    def pseudo_labels(self, logits: Named, threshold: float) -> tuple[Tensor, dict[str, Tensor]]:
        confidence, classes = logits["logits"].softmax(dim=1).max(dim=1)
        return (confidence >= threshold).float(), {"class": classes, "place": logits["place"]}

    def pseudo_label_losses(self, logits: Named, labels: Named, mask: Tensor) -> Tensor:
        return self.losses(logits, labels) * mask


class Unnamed(ClassAndPlace):
    """The same of a model whose second output has no name."""

    outputs = ("logits", "output_1")


@dataclass
class Answer:
    logits: Tensor
    place: Tensor
    extra_inputs: str = "no tensor"


class Both(nn.Module):
    """Sees a vector and a token of every row, and gives what `kind` says."""

    def __init__(self, kind: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.words = nn.Embedding(5, 6)
        self.body = nn.Linear(10, 8)
        self.where = nn.Linear(8, 2)
        self.which = nn.Linear(8, CLASSES)

    def forward(self, inputs: Named) -> Any:
        rows = torch.cat([inputs["vector"], self.words(inputs["token"])], dim=1)
        hidden = self.body(rows).tanh()
        said = {"logits": self.which(hidden), "place": self.where(hidden)}
        if self.kind == "tuple":
            return tuple(said.values())
        return Answer(**said) if self.kind == "dataclass" else said


class Noisy(IdentityViews):
    """Adds to the vectors what depends on a row's position alone."""

    def strong(self, x: Named, *, positions: Tensor, step: int, **_: Any) -> dict[str, Tensor]:
        noise = torch.sin(positions[:, None] * torch.arange(1.0, 5.0) + step)
        return {**self.plain(x), "vector": x["vector"] + 0.1 * noise}


def batches(step: int) -> tuple[Any, Any]:
    """Global batches; one unlabelled row cannot be used."""
    generator = torch.Generator().manual_seed(step)
    vector = torch.randn(ROWS + UNLABELED, 4, generator=generator)
    token = torch.randint(5, (ROWS + UNLABELED,), generator=generator)
    rows = {"vector": vector, "token": token}
    labels = {"class": token[:ROWS] % CLASSES, "place": vector[:ROWS, :2]}
    valid = torch.ones(UNLABELED, dtype=torch.bool)
    valid[UNLABELED // 2] = False
    return (
        LabeledBatch(narrow(rows, 0, ROWS), labels),
        UnlabeledBatch(narrow(rows, ROWS, UNLABELED), valid=valid),
    )


def algorithm_of(name: str) -> Algorithm:
    made: dict[str, Algorithm] = {
        "fixmatch": FixMatch(threshold=0.2),
        "mean_teacher": MeanTeacher(unsupervised_weight=1.0),
        "supervised": Supervised(),
    }
    algorithm = made[name]
    algorithm.set_task(ClassAndPlace())
    return algorithm


def make_step(
    name: str = "fixmatch",
    kind: str = "dict",
    stage: int | None = None,
    parts: int = 1,
    precision: Any = "fp32",
) -> SemiSupervisedStep:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = launch.make_accelerator(
        launch.ExecutionPlan(
            precision=precision,
            stage=stage,
            loss_scale=SCALE,
            micro_batch=(ROWS + UNLABELED) // ranks // parts,
            accumulation=parts,
        )
    )
    model = Both(kind)
    second = Both(kind) if stage == 3 and name == "mean_teacher" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return SemiSupervisedStep(
        accelerator,
        model,
        optimizer,
        algorithm_of(name),
        Noisy(),
        micro_batches=parts,
        precision=precision,
        loss_scale=SCALE,
        teacher_model=second,
    )


def attempt(step: SemiSupervisedStep, number: int) -> Any:
    engine = step.engine
    return step(
        *(slice_of(b, engine.rank, engine.world_size) for b in batches(number)), measure=True
    )


def curve(options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of four steps, and what the teacher says then."""
    step = make_step(**options)
    losses = [attempt(step, number).metrics["loss"] for number in range(4)]
    with step.evaluating() as predict:
        said = predict(batches(9)[0].inputs)
    return losses, map_tensors(lambda tensor: tensor.detach().clone(), said)


def assert_alike(one: tuple[list[float], Any], other: tuple[list[float], Any]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert list(one[1]) == list(other[1]) == ["logits", "place"]
    for name, tensor in one[1].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["supervised", "fixmatch", "mean_teacher"])
def test_accumulation_and_kinds_of_output_do_not_matter(name: str) -> None:
    alone = curve({"name": name})
    assert alone[0][-1] < alone[0][0]
    assert_alike(curve({"name": name, "parts": 2}), alone)
    assert_alike(curve({"name": name, "kind": "dataclass"}), alone)


def test_the_losses_are_those_of_the_formula() -> None:
    step = make_step("fixmatch")
    model, (x, u) = step.engine.module, batches(0)
    rows = index(u.inputs, u.valid)
    with torch.no_grad():
        own, weak = model(x.inputs), model(rows)
        positions = u.valid.nonzero().flatten()
        strong = model(Noisy().strong(rows, positions=positions, step=0))
    confidence, classes = weak["logits"].softmax(dim=1).max(dim=1)

    def losses(said: Named, labels: Tensor, place: Tensor) -> Tensor:
        picked = said["logits"].log_softmax(dim=1)[torch.arange(len(labels)), labels]
        return -picked + (said["place"] - place).pow(2).sum(dim=1)

    supervised = losses(own, x.labels["class"], x.labels["place"]).mean()
    passed = losses(strong, classes, weak["place"])[confidence >= 0.2].sum() / len(positions)
    found = attempt(step, 0).metrics
    assert found["supervised_loss"] == pytest.approx(supervised.item(), rel=1e-5)
    assert found["unsupervised_loss"] == pytest.approx(passed.item(), rel=1e-5)


def shard(stages: list[int | None], names: list[str]) -> list[Any]:
    return [curve({"name": name, "stage": stage}) for stage in stages for name in names]


def test_two_ranks_are_one_under_ddp_and_every_stage() -> None:
    names = ["fixmatch", "mean_teacher"]
    alone = [curve({"name": name}) for name in names]
    stages: list[int | None] = [None, 1, 2, 3]
    for found in run_ranks(2, shard, stages, names):
        for number, pair in enumerate(found):
            assert_alike(pair, alone[number % len(names)])


def overflow(stage: int | None) -> list[str]:
    """Steps in fp16, in the second of which the second output overflows on the last rank."""
    step = make_step("fixmatch", stage=stage, precision="fp16")
    outcomes = [attempt(step, 0)]

    def explode(module: nn.Module, given: Any, said: Tensor) -> Tensor:
        factor = torch.ones(len(said), 1, dtype=said.dtype)
        factor[0] = 6e4
        last = step.engine.rank == step.engine.world_size - 1
        return said * factor * factor if last else said

    handle = step.engine.module.where.register_forward_hook(explode)
    outcomes.append(attempt(step, 1))
    handle.remove()
    outcomes.append(attempt(step, 2))
    return [f"{outcome.applied} {outcome.overflow_source}" for outcome in outcomes]


@pytest.mark.parametrize("stage", [None, 3])
def test_an_overflow_in_the_second_output_is_found(stage: int | None) -> None:
    for found in run_ranks(2, overflow, stage):
        assert found[0] == found[2] == "True None"
        assert found[1].startswith("False rank 1, supervised term")
        assert found[1].endswith("where")


def test_what_the_model_lacks_is_named_before_training() -> None:
    example = Noisy().plain(batches(0)[0].inputs)
    assert check_model(Both(), example, 99, ClassAndPlace()) is True
    message = r"outputs lack place, which the task .* it returns logits, output_1: return them by"
    with pytest.raises(ConfigError, match=message):
        check_model(Both("tuple"), example, 99, ClassAndPlace())
    assert check_model(Both("tuple"), example, 99, Unnamed()) is True
    with pytest.raises(ConfigError, match=message):
        attempt(make_step(kind="tuple"), 0)


def test_algorithms_that_compute_with_inputs_refuse_several_tensors() -> None:
    step = make_step("fixmatch")
    step.algorithm.groups = 1
    with pytest.raises(ConfigError, match=r"FixMatch mixes .* inputs of several tensors do not"):
        attempt(step, 0)


class Projecting(FixMatch):
    head_names = ("vector",)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        return {"vector": nn.Linear(*features, 4)}


def test_heads_stand_beside_the_outputs() -> None:
    inputs = Noisy().plain(batches(0)[0].inputs)
    algorithm = Projecting()
    whole = with_heads(Both(), algorithm, inputs, "body")
    assert algorithm.input_shape is None
    assert [(n, len(t)) for n, t in whole(inputs).items()] == [
        ("logits", ROWS),
        ("place", ROWS),
        ("vector", ROWS),
    ]
    assert list(whole.eval()(inputs)) == ["logits", "place"]
