"""`hpdist plan`: what each ZeRO stage and FSDP2 need of a GPU's memory, and the first that fits.

Each stage is rehearsed as rank 0 of all GPUs in a process of its own (`hpdist.plan.stages`), so
weights, optimizer, teacher, activations, buckets and temporary tensors are counted, not estimated.
A GPU's other uses of memory are reserved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpdist.engines.bf16_state import BF16_STATE
from hpdist.engines.deepspeed_config import check_file, read_deepspeed
from hpdist.engines.operators import needed_builders, prepare_operators
from hpdist.errors import ConfigError, RehearsalError
from hpdist.plan.rehearsal import STEPS
from hpdist.plan.stages import GIB, STAGES, Stage, StagePlan, rehearse_stages, rehearsed

__all__ = ["Plan", "StagePlan", "make_plan", "rehearsed", "table"]

RESERVE = 2.0
"""GiB of a GPU that tensors cannot use: CUDA's context, NCCL's and cuBLAS's buffers, gaps."""


@dataclass(frozen=True)
class Plan:
    """All stages, the least sharded first."""

    settings: Mapping[str, Any]
    """The run's settings, nested and complete."""
    gpus: int
    memory: float
    """GiB of a GPU."""
    reserve: float
    stages: Sequence[StagePlan]

    @property
    def room(self) -> float:
        """GiB of a GPU for tensors."""
        return self.memory - self.reserve

    @property
    def fitting(self) -> StagePlan | None:
        """The smallest stage that fits."""
        return next((stage for stage in self.stages if stage.needs <= self.room), None)


def make_plan(
    settings: Mapping[str, Any],
    gpus: int,
    memory: float,
    *,
    reserve: float = RESERVE,
    deepspeed: str | None = None,
    stages: Sequence[Stage] = STAGES,
    log: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Rehearse every stage, or some.

    Without a GPU, fp16 and fp8 are rehearsed as bf16, which needs the same memory.

    Args:
        settings: The run's, nested and complete; its `zero.stage` and `shard.engine` are ignored.
        gpus: The number of GPUs, on all machines together.
        memory: GiB of each.
        reserve: GiB of each that tensors cannot use.
        deepspeed: A DeepSpeed JSON that the launcher would name, for its buckets and so on.
        stages: Those to rehearse, None for DDP and "fsdp2" for FSDP2; by default all.
        log: Receives a line whenever a stage begins.

    Raises ConfigError or DataError if the run could not start, and RehearsalError if no stage could
    be counted.
    """
    if gpus < 1 or not memory > reserve >= 0:
        raise ConfigError(
            f"plan: --gpus {gpus} --gpu-memory {memory:g} --reserve {reserve:g}: at least one "
            "GPU is needed, with more memory than is reserved"
        )
    base = read_deepspeed(deepspeed)
    if deepspeed is not None:
        check_file(base, deepspeed)
    settings = _made_explicit(settings, base)
    by_deepspeed = any(isinstance(stage, int) for stage in stages)
    if by_deepspeed and importlib.util.find_spec("deepspeed") is not None:
        # Here it can be logged: the output of a rehearsal is not shown.
        prepare_operators(needed_builders(base), log, settings["watchdog"]["seconds"])
    found = rehearse_stages(
        settings, gpus, stages, base, lambda name: log(f"rehearsing {name} on rank 0 of {gpus}")
    )
    if all(stage.rehearsal is None for stage in found):
        kind = next((s.kind for s in found if s.kind is not None), RehearsalError)
        raise kind(found[0].problem)
    return Plan(settings, gpus, memory, reserve, found)


def table(plan: Plan) -> str:
    """Format the plan for the user: a line for each stage, and the one to choose."""
    counted = next(s.rehearsal for s in plan.stages if s.rehearsal is not None)
    trained = "all" if counted.trained == counted.parameters else f"{counted.trained:,}"
    precision = str(plan.settings["precision"])
    if precision in ("fp16", "fp8") and counted.device == "CPU":
        precision += " (counted in bf16, which is as large)"
    columns = ("weights", "optimizer", "teacher", "activations", "rest", "peak")
    lines = [
        f"{counted.parameters:,} parameters, {trained} trained; {precision}, "
        f"{plan.settings['optim']['name']}; {plan.gpus} GPUs of {plan.memory:g} GiB, "
        f"{counted.rows} rows a forward on each",
        f"GiB of tensors on rank 0, counted on {counted.device} in {STEPS} steps and two batches "
        "of evaluation:",
        "",
        f"{'':8}" + "".join(f"{column:>12}" for column in columns),
    ]
    for stage in plan.stages:
        if stage.rehearsal is None:
            lines.append(f"{stage.name:8}  {stage.problem}")
            continue
        found = stage.rehearsal
        numbers = "".join(f"{getattr(found, column) / GIB:12.3f}" for column in columns)
        fits = "fits" if stage.needs <= plan.room else "does not fit"
        where = "" if found.peak_phase == "step" else f" (peak in {found.peak_phase})"
        lines.append(f"{stage.name:8}{numbers}  {fits}{where}")
    lines += [
        "",
        "Held all the time: weights, optimizer, teacher. Activations: what a forward leaves, under "
        "ZeRO-3",
        "and FSDP2 with the weights gathered for it. Rest, at the peak: gradients, buckets, "
        "temporary tensors.",
        f"Reserved for CUDA's context, NCCL's and cuBLAS's buffers and for gaps: {plan.reserve:g} "
        "GiB (--reserve).",
    ]
    return "\n".join([*lines, _advice(plan)])


def _advice(plan: Plan) -> str:
    best = plan.fitting
    if best is not None:
        if len(plan.stages) == 1:
            return f"{best.name} fits"
        return f"smallest stage that fits: {best.name} ({best.setting}), which communicates least"
    counted = [stage for stage in plan.stages if stage.rehearsal is not None]
    least = min(counted, key=lambda stage: stage.needs)
    failed = "no stage fits: the least, " if len(plan.stages) > 1 else "it does not fit: "
    assert least.rehearsal is not None
    found = least.rehearsal
    ways = []
    if found.activations > found.peak / 4:
        ways.append(f"batch.micro below {found.rows}")
        if not plan.settings["activation_checkpointing"]:
            ways.append("activation_checkpointing: true")
    if found.optimizer > found.peak / 4:
        setting = "shard.offload" if least.stage == "fsdp2" else "zero.offload"
        ways.append(f"{setting}: cpu, which keeps the optimizer's part on the host")
    ways.append("more GPUs")
    return (
        f"{failed}{least.name}, needs {least.needs + plan.reserve:.2f} GiB of "
        f"{plan.memory:g}; what helps: {', '.join(ways)}"
    )


def _made_explicit(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with a precision that can be rehearsed here.

    Raises ConfigError on offload without a GPU.
    """
    zero = base.get("zero_optimization") or {}
    parts = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    ours = [settings[section]["offload"] for section in ("zero", "shard")]
    devices = [*ours, *(part.get("device") for part in parts)]
    if any(device not in (None, "none") for device in devices) and not torch.cuda.is_available():
        raise ConfigError(
            "plan: offload moves memory from the GPU to the host, which can only be measured "
            "separately on a GPU; run plan there, or with --zero.offload none --shard.offload none"
        )
    named = [half for half in ("fp16", "bf16") if (base.get(half) or {}).get("enabled") is True]
    precision = settings["precision"] or (named[0] if named else "fp32")
    theirs = base.get("bf16") or {}
    state = {key: settings["zero"][key] or theirs.get(key) is True or None for key in BF16_STATE}
    return {**settings, "precision": precision, "zero": {**settings["zero"], **state}}
