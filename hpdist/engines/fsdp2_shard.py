"""Shards a model and its optimizer by FSDP2, `torch.distributed.fsdp.fully_shard`.

model, optimizer = hpdist.fully_shard(accelerator, hpdist.global_batch_norm(model), optimizer)
step = hpdist.SemiSupervisedStep(accelerator, model, optimizer, FixMatch(), views)

Every rank keeps an equal part of each weight, in fp32, with its gradient and its optimizer state. A
unit's weights are gathered for its forward and backward, in half precision if the run is, and
gradients are averaged in fp32. Accelerate's own preparation averages them in half precision, and
leaves CPU ranks unsharded without a word, so the model is not given to it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from hpdist.distributed.module_names import named_parameters, shortened, without_wrappers
from hpdist.engines.config import Precision, Shard
from hpdist.engines.fsdp2_units import MIN_PARAMETERS, find_units
from hpdist.engines.zero_shapes import leave_out_empty, unregister_empty
from hpdist.errors import ConfigError

M = TypeVar("M", bound=nn.Module)
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Sharded:
    """How a model was sharded."""

    precision: Precision
    reshards: bool
    """Whether a unit's weights are released after each forward."""


_sharded: weakref.WeakKeyDictionary[nn.Module, Sharded] = weakref.WeakKeyDictionary()


def sharding_of(model: nn.Module) -> Sharded | None:
    """Return how `fully_shard` sharded a model; None if it did not."""
    return _sharded.get(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether anything sharded a model by FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a while
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def torch_shards() -> bool:
    """Whether the installed torch has what the engine needs of FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def check_torch() -> None:
    """Raise ConfigError if the installed torch lacks what the engine needs of FSDP2."""
    if not torch_shards():
        raise ConfigError(
            f"shard.engine: fsdp2 needs torch 2.13 or newer, and {torch.__version__} is installed: "
            "with older ones ranks wait for ever for a gradient that only some of them have"
        )


def fully_shard(
    accelerator: Accelerator,
    model: M,
    optimizer: torch.optim.Optimizer,
    *,
    precision: Precision | None = None,
    shard: Shard | None = None,
) -> tuple[M, torch.optim.Optimizer]:
    """Shard a model and its optimizer over all ranks, in place, and return both.

    Call it instead of `accelerator.prepare`, before the optimizer has done a step.

    Args:
        accelerator: Has joined the ranks; on CPU ranks `Accelerator(cpu=True)`.
        model: Not prepared; its weights become fp32.
        optimizer: Of the model's parameters.
        precision: In which forward and backward compute; by default the accelerator's.
        shard: Which parts are gathered together, and how long; by default as `Shard()` says.

    Collective: every rank must call. Raises ConfigError for a model that FSDP2 cannot shard.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
    )
    from torch.distributed.fsdp import (
        fully_shard as shard_module,
    )

    check_torch()
    shard, precision = shard or Shard(), precision or _precision_of(accelerator)
    if optimizer.state:
        raise ConfigError("fully_shard: the optimizer has done steps already; shard before them")
    if without_wrappers(model) is not model or model._compiled_call_impl is not None:
        raise ConfigError(
            "fully_shard: the model is compiled or wrapped already; give the module inside, as "
            "hpdist does not compile a model that FSDP2 shards"
        )
    device = accelerator.device
    if not dist.is_initialized():  # one process that nothing launched
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    unregister_empty(model, torch.float32, device)
    leave_out_empty(optimizer)
    _check_parameters(model)
    before = dict(named_parameters(model))
    reshards = shard.reshard_after_forward is not False
    offloads = shard.offload == "cpu"
    dtype = DTYPES[precision]
    options: dict[str, Any] = {
        "mesh": dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if precision == "fp32" else dtype, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if offloads
        else OffloadPolicy(),
    }
    for unit in find_units(model, shard.units, _least(shard)):
        shard_module(unit, reshard_after_forward=reshards, **options)
    # What is left is used at both ends of the forward: releasing it in between gains nothing.
    shard_module(model, reshard_after_forward=False, **options)
    _replace(optimizer, before, dict(named_parameters(model)))
    for buffer in model.buffers():  # those of an offloaded model too
        buffer.data = buffer.data.to(device)
    _sharded[model] = Sharded(precision, reshards)
    accelerator._models.append(model)  # where the hooks of `save_state` look for it
    return model, optimizer


def _precision_of(accelerator: Accelerator) -> Precision:
    mixed = accelerator.mixed_precision
    return "fp32" if mixed == "no" else cast(Precision, mixed)


def _least(shard: Shard) -> int:
    return MIN_PARAMETERS if shard.min_parameters is None else shard.min_parameters


def _check_parameters(model: nn.Module) -> None:
    """Make weights contiguous and fp32. Raises ConfigError for those that cannot be sharded."""
    unfit: dict[str, Callable[[nn.Parameter], bool]] = {
        "is complex; keep real and imaginary parts as two parameters": lambda p: p.is_complex(),
        "has no dimensions; give it the shape [1]": lambda p: p.dim() == 0,
    }
    for why, is_unfit in unfit.items():
        names = [name for name, p in named_parameters(model) if is_unfit(p)]
        if names:
            raise ConfigError(
                f"model: {shortened(names)} cannot be sharded by shard.engine: fsdp2, because it "
                f"{why}, or shard by zero.stage, or leave both out to train with DDP"
            )
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(dtype).contiguous()


def _replace(
    optimizer: torch.optim.Optimizer,
    before: dict[str, nn.Parameter],
    after: dict[str, nn.Parameter],
) -> None:
    """Have the optimizer step the shards in place of the whole parameters."""
    shards = {id(parameter): after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if id(p) not in shards]
        if unknown:
            raise ConfigError(
                f"fully_shard: {len(unknown)} parameters of the optimizer are not the model's; "
                "make the optimizer of the model's own parameters"
            )
        group["params"] = [shards[id(parameter)] for parameter in group["params"]]
