"""Asking any model for its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdist.models.stored import SeenInFull


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
def on_trial(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation and nothing has a gradient; then it is as it was.

    It may have `weights_as_stored`.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), SeenInFull():
            yield
    finally:
        model.train(training)
