"""Linear layers that multiply in fp8, by torchao; the rest of the model computes in bf16.

Weights stay fp32, with the same names, and are cast with one scale for each tensor in every
forward. Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from hpdist.errors import ConfigError
from hpdist.messages.human import counted
from hpdist.models.output_layers import output_layers

_LEAST = (8, 9)  # compute capability
_MULTIPLE = 16  # of both sizes of a layer, which the GPU's fp8 products need


def check_fp8() -> None:
    """Raise ConfigError unless the device multiplies in fp8 and torchao is installed."""
    least = ".".join(map(str, _LEAST))
    needs = f"precision: fp8 needs a GPU of compute capability {least} or higher (Ada, Hopper)"
    if not torch.cuda.is_available():
        raise ConfigError(f"{needs}, and no GPU is visible; use bf16")
    found = torch.cuda.get_device_capability()
    if found < _LEAST:
        raise ConfigError(f"{needs}, and this one has {'.'.join(map(str, found))}; use bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            'precision: fp8 needs torchao, which is not installed; pip install "hpdist[fp8]"'
        )


def fp8_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers that can multiply in fp8.

    Both sizes are multiples of 16, and the layer is no output layer, whose rounding the loss sees.
    """
    kept = set(output_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module not in kept
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    ]


def to_fp8(model: nn.Module, *, emulate: bool = False) -> str:
    """Have a model's linear layers multiply in fp8, in place; return what a run says of it.

    With `emulate` they only round as fp8 does, on any device. Raises ConfigError if there is no
    layer for it.
    """
    chosen = set(fp8_layers(model))
    if not chosen:
        raise ConfigError(
            f"precision: fp8: the model has no hidden linear layer whose sizes are multiples of "
            f"{_MULTIPLE}; use bf16"
        )
    torchao: Any = importlib.import_module("torchao.float8")
    torchao.convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: name in chosen,
        config=torchao.Float8LinearConfig(pad_inner_dim=True, emulate=emulate),  # for any rows
    )
    return f"note: fp8 products in {counted(len(chosen), 'linear layer')}; the rest is in bf16"
