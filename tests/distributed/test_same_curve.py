"""What trades time for memory changes no number: the same steps with it and without."""

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
from hpdist.data.batch import LabeledBatch
from hpdist.data.views import ImageViewsConfig
from hpdist.engines import launch
from hpdist.engines.config import LossScale
from hpdist.engines.prepare import prepare
from hpdist.evaluate.scoring import evaluate_both
from hpdist.models.activation_checkpointing import checkpoint_activations
from hpdist.train.passes import FusedPass, Passes
from hpdist.train.step import SemiSupervisedStep
from tests.support import lockstep
from tests.support.lockstep import Recorded
from tests.support.ranks import run_ranks
from tests.support.recipes import (
    LABELED,
    UNLABELED,
    digits,
    make_model,
    make_step,
    sharded_by,
    train,
)
from tests.support.sampling import selected

RANKS = 2
POINTS = (0, 1, 3, 7)
STAGES = [None, 2, 3, "fsdp2"]


def build(
    stage: int | str | None, *, checkpointed: bool = False, compiled: bool = False
) -> SemiSupervisedStep:
    """The step of the recipes around a model that is changed as the trainer changes it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = (LABELED + UNLABELED) // RANKS
    sharding = launch.ExecutionPlan(**sharded_by(stage), micro_batch=rows)
    accelerator = launch.make_accelerator(sharding)
    algorithm = FixMatch(threshold=0.15)
    model = make_model(algorithm, "batch", smooth=True)
    if checkpointed:
        checkpoint_activations(model)
    if compiled:
        # Not inductor, whose C++ compiler takes its time; what it is given to compile is the same.
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model, optimizer = prepare(accelerator, model, optimizer, sharding)
    views = ImageViewsConfig().build(0)
    return SemiSupervisedStep(accelerator, model, optimizer, algorithm, views)


def cut(micro_batches: int, stage: int | str | None, **options: Any) -> SemiSupervisedStep:
    return make_step("fixmatch", stage=stage, smooth=True, micro_batches=micro_batches, **options)


HALF = {"precision": "fp16", "loss_scale": LossScale(initial=2.0**8)}
# What is recorded, and those that must do the same.
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {"plain, None": partial(build, None)},
    "whole": {"1 micro-batches, None": partial(cut, 1, None)},
    "half": {"1 micro-batches, fp16": partial(cut, 1, 2, **HALF)},
}
for _stage in STAGES:
    SETUPS["plain"] |= {
        f"plain, {_stage}": partial(build, _stage),
        f"checkpointed, {_stage}": partial(build, _stage, checkpointed=True),
    }
    if _stage != "fsdp2":
        SETUPS["plain"][f"compiled, {_stage}"] = partial(build, _stage, compiled=True)
    for _micro in (1, 2):
        SETUPS["whole"][f"{_micro} micro-batches, {_stage}"] = partial(cut, _micro, _stage)
SETUPS["plain"]["compiled and checkpointed, None"] = partial(
    build, None, checkpointed=True, compiled=True
)
SETUPS["whole"]["2 micro-batches, fsdp2 whole"] = partial(cut, 2, "fsdp2 whole")
for _stage in (1, 2, 3, "fsdp2"):
    SETUPS["plain"][f"offloaded, {_stage}"] = partial(
        make_step, "fixmatch", norm="batch", smooth=True, stage=_stage, offload="cpu", lr=0.02
    )
SETUPS["half"]["2 micro-batches, fp16"] = partial(cut, 2, 2, **HALF)


@dataclass
class Compared:
    """Runs held against one that was recorded, on one rank."""

    recorded: dict[str, Recorded]
    told: dict[str, dict[int, list[str]]]  # by run and step, what differs


def compare(names: set[str]) -> Compared:
    """Record the first setup of each kind, and have those of these names follow it."""
    found = Compared({}, {})
    for kind, setups in SETUPS.items():
        tolerance = 0.02 if kind == "half" else lockstep.TOLERANCE
        for name, make in setups.items():
            if kind in found.recorded and name not in names:
                continue
            counters.clear()
            step = make()
            if step.engine.accelerator.distributed_type == DistributedType.DEEPSPEED:
                offload = step.engine.deepspeed.zero_offload_optimizer()
                assert (offload is not None and offload.device == "cpu") == ("offloaded" in name)
            if kind not in found.recorded:
                found.recorded[kind] = lockstep.record(step, POINTS, tolerance=tolerance)
                continue
            found.told[name] = lockstep.follow(step, found.recorded[kind], tolerance=tolerance)
            assert (counters["stats"]["unique_graphs"] > 0) == ("compiled" in name)
    return found


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> list[Compared]:
    return run_ranks(RANKS, compare, {name for (name,) in selected(request, "name")})


def test_the_curve_goes_somewhere(runs: list[Compared]) -> None:
    for run in runs[0].recorded.values():
        assert len({record["loss"] for record in run.curve}) == len(run.curve)
    state = runs[0].recorded["plain"].steps[POINTS[-1]].after
    counts = [b for n, b in state.kinds["buffers"].items() if n.endswith("batches_tracked")]
    assert [float(count) for count in counts] == 6 * [POINTS[-1] + 1]
    assert runs[0].recorded["plain"].curve == runs[1].recorded["plain"].curve


# Each way and each stage is in the default run, but not each pair of them.
MORE = {
    *("checkpointed, None", "checkpointed, 2", "compiled, None", "compiled, 3"),
    *("offloaded, 1", "offloaded, 2", "1 micro-batches, 2", "1 micro-batches, 3"),
    *("plain, fsdp2", "1 micro-batches, fsdp2", "2 micro-batches, fsdp2", "offloaded, fsdp2"),
    *("checkpointed, fsdp2", "compiled, 2", "compiled and checkpointed, None"),
}


def names(*ways: str) -> list[Any]:
    """Return the names of those that follow, and begin so."""
    followers = [name for setups in SETUPS.values() for name in list(setups)[1:]]
    assert set(followers) >= MORE
    return [
        pytest.param(name, marks=pytest.mark.slow if name in MORE else [])
        for name in followers
        if name.startswith(ways)
    ]


@pytest.mark.parametrize("name", names("checkpointed", "compiled"))
def test_activation_checkpointing_and_compile(runs: list[Compared], name: str) -> None:
    assert [found.told[name] for found in runs] == [{}, {}]


@pytest.mark.parametrize("name", names("plain", "1 micro", "2 micro"))
def test_sharding_and_accumulation(runs: list[Compared], name: str) -> None:
    assert [found.told[name] for found in runs] == [{}, {}]


@pytest.mark.parametrize("name", names("offloaded"))
def test_offload(runs: list[Compared], name: str) -> None:
    assert [found.told[name] for found in runs] == [{}, {}]


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
    model = make_model(FixMatch(), "batch", smooth=True).eval()
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
        assert type(step._passes) is FusedPass
        passes = FusedPass if fused else Passes
        step._passes = passes(step.engine, step.algorithm, step.teacher, step.rank_timer)
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
