"""What a process reports about its machine: packages, GPUs, disks, clocks."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpdist.data.config import Data
from hpdist.engines.execution_plan import ExecutionPlan

_PACKAGES = ("hpdist", "torch", "accelerate", "deepspeed", "datasets", "transformers", "wandb")


@dataclass(frozen=True)
class Requirements:
    """A run's requirements of the machines."""

    run_folders: Path
    """The folder that holds the run folders."""
    data: Data
    precision: str | None = None
    fsdp2: bool = False
    """Whether the run is sharded by FSDP2."""
    engine: ExecutionPlan | str | None = None
    """How the run computes and shards, or why it cannot; None: its engine is not checked."""


def own_facts(requirements: Requirements | None) -> dict[str, Any]:
    """Collect the facts of this process."""
    devices = [_device(number) for number in range(torch.cuda.device_count())]
    folder = nearest_folder(requirements.run_folders if requirements is not None else Path())
    return {
        "host": socket.gethostname(),
        "versions": {"Python": platform.python_version(), **_installed()},
        "devices": devices,
        "gpu": _own_gpu(len(devices)),
        "bf16": torch.cuda.is_bf16_supported() if devices else True,
        "fp16": bool(devices),
        "fsdp2": _shards() if requirements is not None and requirements.fsdp2 else None,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "builds": _left_builds(),
        "free": {str(path): shutil.disk_usage(path).free for path in {folder, Path("/tmp")}},
    }


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            found[package] = "missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _device(number: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(number)
    properties = torch.cuda.get_device_properties(number)
    return {"name": properties.name, "uuid": str(properties.uuid), "free": free, "total": total}


def _own_gpu(gpus: int) -> int | None:
    """The number of this process's GPU on its host, if a launcher has assigned one."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return int(local) % gpus if gpus else None


def _shards() -> bool:
    """Whether torch can shard by FSDP2, whose import takes a while."""
    from hpdist.engines.fsdp2_shard import torch_shards

    return torch_shards()


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _left_builds() -> list[str] | None:
    """Locks that a killed compilation has left here; None if nothing compiles."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from hpdist.engines.operators import left_locks

    return [str(lock) for lock in left_locks()]
