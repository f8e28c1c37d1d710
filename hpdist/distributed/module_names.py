"""Names of weights as in the user's own model, whatever wraps it or parts of it.

`torch.compile(model)`, DDP and checkpointing wrappers insert a segment into every name. A
checkpoint must not depend on them, or it could not be continued without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_COMPILED = "_orig_mod"
_SEGMENTS = {_COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """A parameter's, buffer's or module's name without the segments of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and `torch.compile`, in any order."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else None
        inner = inner or model._modules.get(_COMPILED)  # not getattr, which would call the module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """DDP's wrapper, if there is one: a launcher may have compiled it."""
    inner = model._modules.get(_COMPILED)
    found = model if inner is None else inner
    return found if isinstance(found, DistributedDataParallel) else None


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters, each once, by their plain names."""
    return ((plain_name(name), parameter) for name, parameter in model.named_parameters())


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's buffers, each once, by their plain names."""
    return ((plain_name(name), buffer) for name, buffer in model.named_buffers())


def with_plain_names(values: Mapping[str, T], *, under_ddp: bool) -> dict[str, T]:
    """The content of a checkpoint by name, without the wrappers that an earlier version left in.

    Args:
        values: By a parameter's or buffer's name.
        under_ddp: Whether several ranks wrote it. Then every name begins with `_orig_mod.module`
        if a launcher compiled DDP's wrapper, whose segment is `module`.
    """
    wrapped = f"{_COMPILED}.module."
    if under_ddp and values and all(name.startswith(wrapped) for name in values):
        values = {name.removeprefix(wrapped): value for name, value in values.items()}
    return {plain_name(name): value for name, value in values.items()}


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Shorten a list of names for a message: the first of them, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def collapsed(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of parameters; one module name if all that it trains is among them."""
    wanted = set(names)
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        trained = {prefix + name for name, p in named_parameters(module) if p.requires_grad}
        if prefix and trained and trained <= wanted:
            if len(trained) > 1:
                found.append(f"{prefix[:-1]} ({len(trained)} parameters)")
            else:
                found.extend(trained)
            return
        own = {prefix + name for name, _ in module.named_parameters(recurse=False)}
        found.extend(sorted(own & wanted))
        for name, child in module.named_children():
            inside = "" if name in _SEGMENTS else f"{name}."
            walk(child, prefix + inside)

    walk(model, "")
    return list(dict.fromkeys(found))
