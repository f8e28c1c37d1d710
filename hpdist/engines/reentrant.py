"""Refuses the old way to recompute activations where DeepSpeed silently computes wrong gradients.

Under ZeRO-3 a module that a step uses twice, inside `torch.utils.checkpoint` with
`use_reentrant=True`, gets a gradient that is 0.88 off in DeepSpeed 0.19.8, without an error.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node

from hpdist.errors import ConfigError

_NODE = "CheckpointFunctionBackward"
"""The name of a reentrant checkpoint in the graph; DeepSpeed's own has the same."""


def is_reentrant(outputs: Iterable[Tensor]) -> bool:
    """Whether outputs were computed through a reentrant checkpoint."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    visited: set[Node] = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == _NODE:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                waiting.append(following)
    return False


def reentrant_error(outputs: Iterable[Tensor]) -> ConfigError | None:
    """The error if outputs were computed through a reentrant checkpoint."""
    if not is_reentrant(outputs):
        return None
    return ConfigError(
        "model: it recomputes activations through torch.utils.checkpoint with use_reentrant=True, "
        f"with which ZeRO-3 of DeepSpeed {importlib.metadata.version('deepspeed')} silently "
        "computes wrong gradients where a step uses a module twice; pass use_reentrant=False (to a "
        "Hugging Face model: gradient_checkpointing_enable(gradient_checkpointing_kwargs="
        '{"use_reentrant": False})), or leave it to activation_checkpointing: true'
    )
