"""Half precision after training: what is rounded, what stays in fp32, and on which device.

Weights are held in half precision; normalisations and softmax compute in fp32, as autocast has it.
A CPU multiplies fp16 thirty times slower than fp32, so there fp16 is simulated: weights, and what
goes into and comes out of every multiplication, are rounded to fp16, and the arithmetic is fp32.
That gives fp16's accuracy, also where it overflows, and not its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from hpdist.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIMULATED = (
    "fp16 is simulated on this CPU: weights, and what goes into and comes out of every "
    "multiplication, are rounded to fp16; its scores are those of fp16, its seconds are not"
)

_NORMS = (
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def check_precision(precision: str) -> None:
    """Raise ConfigError unless it is one of fp32, bf16 and fp16."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}")


def keeps_full_precision(module: nn.Module) -> bool:
    """Whether a module's own weights stay in fp32: those of normalisations."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith("RMSNorm")


def is_simulated(precision: str, device: torch.device) -> bool:
    """Whether a device only gives a precision's accuracy, and not its speed."""
    return precision == "fp16" and device.type == "cpu"


def cast_weights(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Move a model to a device with its weights in a precision; in place, and returned.

    Raises ConfigError for an unknown precision.
    """
    check_precision(precision)
    half = HALF_DTYPES.get(precision)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            rounded = parameter.data
            if half is not None and not keeps_full_precision(module):
                rounded = rounded.to(half)
            if half is None or keeps_full_precision(module) or is_simulated(precision, device):
                rounded = rounded.float()
            parameter.data = rounded
            parameter.requires_grad_(False)
        for buffer in module.buffers(recurse=False):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                buffer.data = buffer.data.float()
    return model.to(device).eval()


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, forwards of a model whose weights were cast compute in the precision."""
    half = HALF_DTYPES.get(precision)
    mode: Any = nullcontext()
    if is_simulated(precision, device):
        mode = RoundedProducts(torch.float16)
    elif half is not None:
        mode = torch.autocast(device.type, dtype=half)
    with torch.inference_mode(), mode:
        yield


def weight_bytes(model: nn.Module, precision: str) -> int:
    """The bytes that a model's weights and buffers take in a precision."""
    half = precision in HALF_DTYPES
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            small = half and parameter.is_floating_point() and not keeps_full_precision(module)
            total += parameter.numel() * (2 if small else parameter.element_size())
        total += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    return total


class RoundedProducts(TorchFunctionMode):
    """Inside, the operands and the results of multiplications are rounded to a half dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function; of a multiplication, with what it is given and gives rounded."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        rounded = [self._round(value) for value in args]
        named = {key: self._round(value) for key, value in kwargs.items()}
        return self._round(func(*rounded, **named))

    def _round(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(self._dtype).float()
        return value


_PRODUCTS = frozenset(
    {
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.addmm, Tensor.baddbmm),
    }
)
