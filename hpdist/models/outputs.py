"""Asking any model for its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdist.models.stored import SeenInFull


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns: a tensor, or an output with `.logits`; fp32."""
    return cast(Tensor, getattr(output, "logits", output)).float()


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
