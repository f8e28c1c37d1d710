"""Weights as a checkpoint stores them: pages of its files, and no memory of a process's own.

Loading a checkpoint in half precision as fp32 makes a copy in every process. Where the weights are
soon sharded, they are left in the stored dtype until then, and what looks at the whole model before
sees them in fp32, one at a time.
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
    """Inside, models of checkpoints may be built with weights in the dtype that is stored.

    Their engine makes them what it needs; `FullPrecisionReads` runs them before.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def loading_as_stored(transformers: Any, config: Any) -> Iterator[bool]:
    """Have `from_pretrained` keep the stored dtypes, if that is wanted and possible; whether it is.

    `mark_stored` has to see the model then. The `dtype` that is asked for is still that of what the
    checkpoint does not hold, such as a last layer and the buffers that a model computes itself.
    """
    base = transformers.PreTrainedModel
    possible = hasattr(base, "_get_dtype_plan") and not hasattr(config, "quantization_config")
    if not (_wanted.get() and possible):
        yield False
        return
    # transformers' own list of names that get another dtype, where None is the stored one.
    kept = base._get_dtype_plan
    base._get_dtype_plan = lambda *_: {"*": None}
    try:
        yield True
    finally:
        base._get_dtype_plan = kept


def mark_stored(model: nn.Module) -> None:
    """Mark the parameters that are in half precision, and bring all the rest to fp32."""
    for parameter in model.parameters():
        if parameter.dtype in HALF:
            parameter.as_stored = True  # type: ignore[attr-defined]
        elif parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


class FullPrecisionReads(TorchFunctionMode):
    """Inside, every function of torch is given marked parameters in fp32, to look at only.

    Each gets a copy that lives as long as the function runs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call it with fp32 in place of half precision; the dtype of a parameter is fp32 too."""
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
    """What a function is given, with fp32 in place of marked parameters."""
    if isinstance(value, Tensor):
        return value.detach().float() if _is_stored(value) else value
    if type(value) in (tuple, list):
        return type(value)(_in_full(part) for part in value)
    return value


def _is_stored(value: Any) -> bool:
    return getattr(value, "as_stored", False) is True
