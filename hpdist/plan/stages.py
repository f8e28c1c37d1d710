"""Rehearses the ways to shard a run, in processes of their own, and reads what they found.

On a CPU they are forks of one process, as many at once as there are cores: what they import takes
longer than what they do. On a GPU, whose memory they would share, one process follows another.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from hpdist.engines.bf16_state import BF16_STATE
from hpdist.errors import ConfigError, DataError, HpdistError, RehearsalError
from hpdist.plan.rehearsal import ERRORS, Rehearsal

Stage: TypeAlias = int | Literal["fsdp2"] | None
"""A way to shard: a ZeRO stage, FSDP2, or None for one GPU or DDP."""
STAGES: tuple[Stage, ...] = (None, 1, 2, 3, "fsdp2")
"""All ways to shard, the least first."""
GIB = 2**30
_KINDS: tuple[type[HpdistError], ...] = (ConfigError, DataError, RehearsalError)


@dataclass(frozen=True)
class StagePlan:
    """One way to shard, and the result of its rehearsal."""

    stage: Stage
    rehearsal: Rehearsal | None
    problem: str = ""
    """Why there is no rehearsal."""
    kind: type[HpdistError] | None = None
    """The error that training would raise."""

    @property
    def name(self) -> str:
        """The stage's name in messages."""
        if self.stage == "fsdp2":
            return "FSDP2"
        return "DDP" if self.stage is None else f"ZeRO-{self.stage}"

    @property
    def setting(self) -> str:
        """The setting that chooses it."""
        if self.stage == "fsdp2":
            return "shard.engine: fsdp2"
        return f"zero.stage: {'null' if self.stage is None else self.stage}"

    @property
    def needs(self) -> float:
        """GiB of tensors at the peak; infinite if they could not be counted."""
        return self.rehearsal.peak / GIB if self.rehearsal is not None else float("inf")


def rehearsed(
    settings: Mapping[str, Any],
    gpus: int,
    stage: Stage,
    base: Mapping[str, Any] | None = None,
) -> StagePlan:
    """Rehearse a stage in a process of its own; `base` is a DeepSpeed config."""
    (found,) = rehearse_stages(settings, gpus, (stage,), base)
    return found


def rehearse_stages(
    settings: Mapping[str, Any],
    gpus: int,
    stages: Sequence[Stage],
    base: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda name: None,
) -> list[StagePlan]:
    """Rehearse some stages, each in a process of its own; `log` is given the name of each.

    The others are left out where the first ends with an error that is theirs too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = min(cores or 1, len(stages))
    together = [stages] if not torch.cuda.is_available() else [[stage] for stage in stages]
    found: list[StagePlan] = []
    with tempfile.TemporaryDirectory() as folder:
        for some in together:
            wanted = [_wanted(settings, gpus, stage, base or {}, Path(folder)) for stage in some]
            threads = None if len(some) == 1 else max((cores or 1) // at_once, 1)
            given = [{**one, "threads": threads} for one in wanted]
            status = _run(given, at_once, Path(folder), log)
            read = [_found(s, Path(w["target"]), status) for s, w in zip(some, wanted, strict=True)]
            found += read[:1] if read[0].kind is not None and not found else read
            if found[0].kind is not None:
                break
    return found


def _wanted(
    settings: Mapping[str, Any], gpus: int, stage: Stage, base: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Describe a rehearsal, and write the DeepSpeed file that it needs."""
    by_zero = stage if isinstance(stage, int) else None
    values = {**settings, "zero": {**settings["zero"], "stage": by_zero}}
    values["shard"] = {**settings["shard"], "engine": "fsdp2"} if stage == "fsdp2" else {}
    if values["precision"] in ("fp16", "fp8") and not torch.cuda.is_available():
        values["precision"] = "bf16"
    if by_zero is None:
        values["zero"] |= {"offload": None, "nvme_path": None, **dict.fromkeys(BF16_STATE)}
    name = StagePlan(stage, None).name
    deepspeed = None
    if base and by_zero is not None:
        other = {key: value for key, value in base.items() if key not in ("fp16", "bf16")}
        other["zero_optimization"] = (base.get("zero_optimization") or {}) | {"stage": by_zero}
        deepspeed = str(folder / f"{name}.deepspeed")
        Path(deepspeed).write_text(json.dumps(other))
    target = str(folder / f"{name}.json")
    return {
        "name": name,
        "settings": values,
        "ranks": gpus,
        "deepspeed": deepspeed,
        "target": target,
    }


def _run(
    stages: Sequence[Mapping[str, Any]], at_once: int, folder: Path, log: Callable[[str], None]
) -> int:
    """Have a process rehearse some stages; give its exit status."""
    source = folder / "wanted"
    source.write_text(
        json.dumps({"parent": os.getpid(), "at_once": at_once, "stages": list(stages)})
    )
    command = [sys.executable, "-m", "hpdist.plan.rehearsal", str(source)]
    errors = Path(stages[0]["target"]).with_suffix(ERRORS)
    with (
        errors.open("wb") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=_environment()
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log(line.strip())
    return process.returncode


def _found(stage: Stage, target: Path, status: int) -> StagePlan:
    found: dict[str, Any] = {"ended": status}
    if target.exists():
        found = json.loads(target.read_text())
    if "ended" in found:
        errors = target.with_suffix(ERRORS)
        printed = errors.read_text(errors="replace") if errors.exists() else ""
        return StagePlan(stage, None, _why_it_ended(printed, found["ended"]))
    if "error" in found:
        kind = next((k for k in _KINDS if k.__name__ == found["error"]), RehearsalError)
        return StagePlan(stage, None, found["message"], kind)
    return StagePlan(stage, Rehearsal(**found))


def _environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, which a rehearsal sets itself."""
    launched = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    dropped = (*launched, "TORCHELASTIC_", "ACCELERATE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _why_it_ended(printed: str, status: int) -> str:
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    if status == -signal.SIGKILL:
        return "could not be rehearsed: the system killed it, probably for lack of memory"
    if "OutOfMemoryError" in last or "can't allocate memory" in last:
        return "could not be rehearsed: this machine does not have enough memory for it"
    return f"could not be rehearsed: {last or f'it ended with status {status}'}"
