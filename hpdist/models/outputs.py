"""Asking any model for its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdist.distributed.batch_norm import batch_norms
from hpdist.models.stored import SeenInFull

NO_GRADIENT = (
    "model: its outputs have no gradient, so nothing could be trained; look for forward() under "
    "torch.no_grad() or inference_mode(), for a detach(), or for trained layers that it leaves out"
)


def find_logits(output: Any) -> Any:
    """What stands for the logits in a model's output, whatever that is.

    The output itself; its `.logits` or, of a dict, its `"logits"`; of a tuple without names, as
    `return_dict=False` gives it, the first.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns (`find_logits` says which), fp32."""
    return cast(Tensor, find_logits(output)).float()


@contextmanager
def on_trial(model: nn.Module, *, gradient: bool = False) -> Iterator[None]:
    """Inside, the model is in evaluation, and nothing has a gradient unless asked; then as it was.

    It may have `weights_as_stored`, which have none in any case.
    """
    training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(gradient), SeenInFull():
            yield
    finally:
        model.train(training)


def has_gradient_in_training(model: nn.Module, example: Tensor) -> bool:
    """Whether what the model gives of an example in training could train it.

    It is as it was afterwards, its running statistics and torch's generators too. Collective where
    it has batch normalisation.
    """
    training = model.training
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return logits_of(model.train()(example)).requires_grad
    finally:
        model.train(training)
        for norm in batch_norms(model):
            norm.discard()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
