"""Parameters with shapes or dtypes that DeepSpeed cannot handle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hpdist.distributed.module_names import named_parameters, shortened
from hpdist.errors import ConfigError


def check_shardable(model: nn.Module) -> None:
    """Raise ConfigError for complex parameters: DeepSpeed would cast them and lose half."""
    unfit = [name for name, p in named_parameters(model) if p.is_complex() and p.requires_grad]
    if unfit:
        raise ConfigError(
            f"model: {shortened(unfit)} is complex, which DeepSpeed does not train; leave "
            "zero.stage out to train with DDP, or keep real and imaginary parts as two parameters"
        )


@contextmanager
def with_dimensions(model: nn.Module) -> Iterator[None]:
    """Inside, parameters without dimensions have one of size 1, in the same memory.

    DeepSpeed sends every parameter as bytes when it starts, and torch cannot view tensors without
    dimensions as bytes.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    try:
        yield
    finally:
        for parameter in scalars:
            if parameter.numel() == 1:
                parameter.data = parameter.data.view(())


def unregister_empty(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Turn parameters without elements into plain attributes: there is nothing to shard or train.

    ZeRO-3 would wait for ever, as it thinks that they are not gathered yet.
    """
    for module in model.modules():
        empty = [name for name, p in module._parameters.items() if p is not None and not p.numel()]
        for name in empty:
            value = module._parameters.pop(name)
            assert value is not None
            kind = dtype if value.is_floating_point() else value.dtype
            setattr(module, name, value.detach().to(device, kind))


def leave_out_empty(optimizer: torch.optim.Optimizer) -> None:
    """Remove parameters without elements from an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.numel()]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
