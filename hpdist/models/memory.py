"""Trading time for memory: activation checkpointing of any model."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from hpdist.errors import ConfigError


def checkpoint_activations(model: nn.Module) -> None:
    """Have the model's blocks recompute their activations in the backward pass.

    A Hugging Face model does it itself. Otherwise the blocks are the members of `nn.Sequential` and
    `nn.ModuleList` that have children of their own, or whole sequences of plain layers. Raises
    ConfigError where there is neither.
    """
    if hasattr(model, "gradient_checkpointing_enable"):
        cast(Any, model).gradient_checkpointing_enable()
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
        cast(Any, block).forward = partial(checkpoint, block.forward, use_reentrant=False)
