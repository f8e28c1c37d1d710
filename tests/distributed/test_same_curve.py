"""What trades time for memory changes no number: the same loss curve with it and without."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch._dynamo.utils import counters

from hpdist.algorithms import FixMatch
from hpdist.config import LossScale
from hpdist.data.batch import LabeledBatch
from hpdist.data.views import ImageViewsConfig
from hpdist.distributed import launch
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.evaluation import evaluate_both
from hpdist.models import CNN
from hpdist.models.memory import checkpoint_activations
from hpdist.step import SemiSupervisedStep
from tests.ranks import run_ranks
from tests.recipes import LABELED, UNLABELED, digits, make_step, train

RANKS, STEPS = 2, 8
STAGES = [None, 2, 3]
Curve = tuple[list[float], dict[str, Tensor]]  # losses, and buffers at the end


def build(
    stage: int | None, *, norm: str = "batch", checkpointed: bool = False, compiled: bool = False
) -> SemiSupervisedStep:
    """The step of the recipes around a model that is changed as the trainer changes it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = (LABELED + UNLABELED) // RANKS
    accelerator = launch.make_accelerator(launch.Sharding(stage=stage, micro_batch=rows))
    torch.manual_seed(0)
    model = global_batch_norm(CNN(1, 8, 10, norm))  # type: ignore[arg-type]
    if checkpointed:
        checkpoint_activations(model)
    if compiled:
        # Not inductor, whose C++ compiler takes its time; what it is given to compile is the same.
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    views = ImageViewsConfig().build(0)
    return SemiSupervisedStep(accelerator, model, optimizer, FixMatch(threshold=0.15), views)


def curve(step: SemiSupervisedStep) -> Curve:
    metrics = train(step, STEPS)
    assert all(entry["applied"] for entry in metrics)
    buffers = {name: b.detach().clone() for name, b in step.engine.module.named_buffers()}
    return [entry["loss"] for entry in metrics], buffers


SETUPS: dict[str, Any] = {}
for _stage in STAGES:
    SETUPS |= {
        f"plain, {_stage}": partial(build, _stage),
        f"checkpointed, {_stage}": partial(build, _stage, checkpointed=True),
        f"compiled, {_stage}": partial(build, _stage, compiled=True),
    }
    for _micro in (1, 2):
        SETUPS[f"{_micro} micro-batches, {_stage}"] = partial(
            make_step, "fixmatch", stage=_stage, micro_batches=_micro
        )
SETUPS["compiled and checkpointed, None"] = partial(build, None, checkpointed=True, compiled=True)
for _stage in (1, 2, 3):
    SETUPS[f"offloaded, {_stage}"] = partial(
        make_step, "fixmatch", norm="batch", stage=_stage, offload="cpu", lr=0.02
    )
for _micro in (1, 2):
    SETUPS[f"{_micro} micro-batches, fp16"] = partial(
        make_step,
        "fixmatch",
        stage=2,
        precision="fp16",
        micro_batches=_micro,
        loss_scale=LossScale(initial=2.0**8),
    )


def curves() -> dict[str, Curve]:
    found = {}
    for name, make in SETUPS.items():
        counters.clear()
        step = make()
        if step.engine.accelerator.distributed_type == DistributedType.DEEPSPEED:
            offload = step.engine.deepspeed.zero_offload_optimizer()
            assert (offload is not None and offload.device == "cpu") == ("offloaded" in name)
        found[name] = curve(step)
        assert (counters["stats"]["unique_graphs"] > 0) == ("compiled" in name)
    return found


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Curve]]:
    return run_ranks(RANKS, curves)


def check_same(runs: list[dict[str, Curve]], one: str, other: str, tolerance: float) -> None:
    for found in runs:
        (losses, buffers), (expected, expected_buffers) = found[one], found[other]
        assert losses == pytest.approx(expected, rel=tolerance)
        assert buffers.keys() == expected_buffers.keys()
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-4, atol=1e-5)
    assert runs[0][one][0] == pytest.approx(runs[1][one][0])


def test_the_curve_goes_somewhere(runs: list[dict[str, Curve]]) -> None:
    for losses, buffers in runs[0].values():
        assert len(set(losses)) == STEPS
        assert all(float(b) == STEPS for n, b in buffers.items() if n.endswith("batches_tracked"))
    assert len(runs[0]["plain, None"][1]) == 6 * 3


@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing(runs: list[dict[str, Curve]], stage: int | None) -> None:
    check_same(runs, f"checkpointed, {stage}", f"plain, {stage}", 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_compile(runs: list[dict[str, Curve]], stage: int | None) -> None:
    check_same(runs, f"compiled, {stage}", f"plain, {stage}", 1e-4)


def test_compile_and_checkpointing_together(runs: list[dict[str, Curve]]) -> None:
    check_same(runs, "compiled and checkpointed, None", "plain, None", 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation(runs: list[dict[str, Curve]], stage: int | None) -> None:
    check_same(runs, f"2 micro-batches, {stage}", f"1 micro-batches, {stage}", 1e-4)


def test_accumulation_in_fp16(runs: list[dict[str, Curve]]) -> None:
    check_same(runs, "2 micro-batches, fp16", "1 micro-batches, fp16", 0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(runs: list[dict[str, Curve]], stage: int) -> None:
    check_same(runs, f"offloaded, {stage}", "plain, None", 1e-4)


def held_out(step: SemiSupervisedStep) -> list[tuple[LabeledBatch, Tensor]]:
    """This rank's half of 400 scans, in two batches."""
    images, labels = digits()
    rows = torch.arange(step.engine.rank, 400, RANKS)
    return [
        (LabeledBatch(images[part], labels[part], part), torch.ones(len(part), dtype=torch.bool))
        for part in rows.split(100)
    ]


@torch.no_grad()
def score_whole_teacher(step: SemiSupervisedStep) -> dict[str, float]:
    """The teacher's accuracy and loss by a model of its own, that nothing shards."""
    model = global_batch_norm(CNN(1, 8, 10)).eval()
    model.load_state_dict(step.teacher.whole())
    images, labels = digits()
    logits = model(step.views.plain(images[:400]))
    accuracy = (logits.argmax(dim=-1) == labels[:400]).double().mean()
    loss = torch.nn.functional.cross_entropy(logits, labels[:400])
    return {"accuracy": float(accuracy), "loss": float(loss)}


@dataclass
class Traced:
    """Training under ZeRO-3 with an evaluation in between."""

    phases: list[str]  # of every invalidation of the prefetch trace
    complete: bool  # whether the trace could be used in the end
    scores: dict[str, float]
    expected: dict[str, float]


def traced() -> dict[bool, Traced]:
    """Of a fused student forward, and of two forwards per step."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    phase, invalidated = "", []
    invalidate = PartitionedParameterCoordinator._invalidate_trace

    def counted(coordinator: Any) -> None:
        invalidated.append(phase)
        invalidate(coordinator)

    PartitionedParameterCoordinator._invalidate_trace = counted
    found = {}
    for fused in (True, False):
        step = build(3)
        assert step._fused
        step._fused = fused
        phase, invalidated = "first step", []
        train(step, 1)
        phase = "training"
        train(step, 6)
        phase = "evaluation"
        measured = evaluate_both(step.engine, step.teacher, step.views, partial(held_out, step))
        scores = measured.values
        expected = score_whole_teacher(step)
        phase = "training again"
        train(step, 3)
        coordinator = step.engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
        found[fused] = Traced(invalidated, coordinator.is_complete_trace(), scores, expected)
    return found


@pytest.fixture(scope="module")
def zero3() -> dict[bool, Traced]:
    return run_ranks(RANKS, traced)[0]


def test_a_fused_step_never_invalidates_the_prefetch_trace(zero3: dict[bool, Traced]) -> None:
    assert zero3[True].phases == []
    assert zero3[True].complete


def test_two_forwards_would_invalidate_it_in_every_step(zero3: dict[bool, Traced]) -> None:
    assert zero3[False].phases.count("training") == 6
    assert zero3[False].phases.count("training again") == 3


@pytest.mark.parametrize("fused", [True, False])
def test_a_lent_teacher_is_what_is_evaluated(zero3: dict[bool, Traced], fused: bool) -> None:
    run = zero3[fused]
    assert run.scores["accuracy"] == run.expected["accuracy"]
    assert run.scores["loss"] == pytest.approx(run.expected["loss"], rel=1e-5)
    assert run.scores["loss"] != pytest.approx(run.scores["loss_student"], rel=1e-5)
