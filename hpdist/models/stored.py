"""Weights as a checkpoint stores them: pages of its files instead of a process's own memory.

Loading a half-precision checkpoint in fp32 makes a copy in every process. If the weights will be
sharded, they keep the stored dtype until then, and code that reads the whole model before gets
them in fp32, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)
_wanted = ContextVar("weights_as_stored", default=False)


@contextmanager
def weights_as_stored(wanted: bool) -> Iterator[None]:
    """Inside, models of checkpoints may be built with weights in the stored dtype.

    Their engine converts them later; `FullPrecisionReads` runs them before that.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def loading_as_stored(transformers: Any, config: Any) -> Iterator[bool]:
    """Have `from_pretrained` keep the stored dtypes, if wanted and possible; return if it does.

    `mark_stored` must then process the model. The requested `dtype` still applies to what the
    checkpoint lacks, such as a last layer and the buffers that a model computes itself.
    """
    base = transformers.PreTrainedModel
    possible = hasattr(base, "_get_dtype_plan") and not hasattr(config, "quantization_config")
    if not (_wanted.get() and possible):
        yield False
        return
    # transformers' own list of names with another dtype, where None is the stored one.
    kept = base._get_dtype_plan
    base._get_dtype_plan = lambda *_: {"*": None}
    try:
        yield True
    finally:
        base._get_dtype_plan = kept


def mark_stored(model: nn.Module) -> None:
    """Mark the parameters in half precision, and convert everything else to fp32."""
    for parameter in model.parameters():
        if parameter.dtype in HALF:
            parameter.as_stored = True  # type: ignore[attr-defined]
        elif parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


class FullPrecisionReads(TorchFunctionMode):
    """Inside, every function of torch gets marked parameters in fp32, for reading only.

    Each gets a copy that lives as long as the function runs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call it with fp32 instead of half precision; a parameter's dtype reads as fp32 too."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and _is_stored(args[0]):
            found = func(*args, **kwargs)
            if isinstance(found, torch.dtype):
                return torch.float32
            return found.float() if isinstance(found, Tensor) else found
        if name == "__set__" or (name.endswith("_") and not name.endswith("__")):  # requires_grad_
            return func(*args, **kwargs)
        return func(*_in_full(args), **{key: _in_full(value) for key, value in kwargs.items()})


def _in_full(value: Any) -> Any:
    """The arguments of a function, with marked parameters replaced by fp32 copies."""
    if isinstance(value, Tensor):
        return value.detach().float() if _is_stored(value) else value
    if type(value) in (tuple, list):
        return type(value)(_in_full(part) for part in value)
    return value


def _is_stored(value: Any) -> bool:
    return getattr(value, "as_stored", False) is True
