"""The device of these tests, and Accelerators on it and on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from hpdist.engines.launch import ALLOW_CPU_FP16
from hpdist.testing import run_ranks
from tests.support.lockstep import State

DRY_RUN = "HPDIST_GPU_DRY_RUN"
"""The variable that has these tests use the CPU in place of a GPU."""
WHY_SKIPPED = f"needs a CUDA device, and none is visible; {DRY_RUN}=1 does all of it on the CPU"


def is_dry_run() -> bool:
    """Whether the CPU stands in for the GPU."""
    return os.environ.get(DRY_RUN) == "1"


def begin_dry_run() -> None:
    """Hide all GPUs from this process and those that it starts; before CUDA is first used."""
    os.environ[DRY_RUN] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ[ALLOW_CPU_FP16] = "1"


def the_device() -> torch.device:
    """The first GPU, or in a dry run the CPU."""
    return torch.device("cpu") if is_dry_run() else torch.device("cuda", 0)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def accelerator_on(device: torch.device, mixed_precision: str = "no") -> Accelerator:
    """A new Accelerator of this process alone; those made before must not be used any more."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def gloo_accelerator() -> Accelerator:
    """One of several ranks that share the device, which NCCL does not support. Collective."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["LOCAL_RANK"] = "0"  # the number of its GPU
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(cpu=the_device().type == "cpu", kwargs_handlers=handlers)


def on_ranks(function: Any, ranks: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call a function on ranks that have an interpreter of their own, and see the device."""
    return run_ranks(_on_rank, ranks, function, args, timeout=timeout, start="spawn")


def _on_rank(function: Any, args: tuple[Any, ...]) -> Any:
    if the_device().type == "cuda":
        os.environ.pop("DS_ACCELERATOR", None)  # `run_ranks` sets it, for ranks on a CPU
    exactly()
    return function(*args)


def exactly() -> None:
    """Compute in fp32 what is fp32, and not in TF32, which keeps 10 bits of a factor's 23."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def moved(state: State, device: torch.device) -> State:
    """A step's state with all tensors on a device."""
    kinds = {
        kind: {name: value.to(device) for name, value in values.items()}
        for kind, values in state.kinds.items()
    }
    return replace(state, kinds=kinds)


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
