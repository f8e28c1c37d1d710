"""Activation checkpointing of any model, which trades time for memory, and the memory in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpdist.distributed.batch_norm import GlobalBatchNorm, batch_norms
from hpdist.errors import ConfigError


def checkpoint_activations(model: nn.Module) -> None:
    """Have the model's blocks recompute their activations in the backward pass.

    Call it after `global_batch_norm`. A Hugging Face model does it itself. Otherwise the blocks are
    the members of `nn.Sequential` and `nn.ModuleList` that have children of their own, or whole
    sequences of plain layers. Raises ConfigError if there is neither, or no support for it.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    norms = list(batch_norms(model))
    if norms:
        options["context_fn"] = partial(_keep_segments, norms)
    whole = model
    while not hasattr(model, "supports_gradient_checkpointing"):
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            model = whole
            break
        model = inner
    # The latter was removed in transformers 6, the former came with 5.
    for method in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, method):
            if not getattr(model, "supports_gradient_checkpointing", True):
                raise ConfigError(
                    f"activation_checkpointing: {type(model).__name__} does not support it"
                )
            getattr(model, method)(**{method.replace("enable", "kwargs"): options})
            return
    containers = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    blocks = [m for c in containers for m in c if any(True for _ in m.children())]
    if not blocks:
        blocks = [c for c in containers if isinstance(c, nn.Sequential)]
    if not blocks:
        raise ConfigError(
            f"activation_checkpointing: {type(model).__name__} has no nn.Sequential or "
            "nn.ModuleList of blocks; call torch.utils.checkpoint in the model itself"
        )
    for block in blocks:
        # Not a wrapper module, which would rename the parameters.
        cast(Any, block).forward = partial(_checkpointed, block.forward, options)


def _checkpointed(
    forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a block's forward; a compiled graph needs no contexts, since it holds what they set."""
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _keep_segments(
    norms: list[GlobalBatchNorm],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward and of its recomputation, with the same virtual batches."""
    return nullcontext(), _with_segments(norms, [norm.virtual_batches for norm in norms])


@contextmanager
def _with_segments(
    norms: list[GlobalBatchNorm], virtual_batches: list[tuple[int, ...] | None]
) -> Iterator[None]:
    own = [norm.virtual_batches for norm in norms]
    for norm, then in zip(norms, virtual_batches, strict=True):
        norm.virtual_batches = then
    try:
        yield
    finally:
        for norm, now in zip(norms, own, strict=True):
            norm.virtual_batches = now


def peak_memory(device: torch.device) -> int:
    """The most bytes that this rank has held: on the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
