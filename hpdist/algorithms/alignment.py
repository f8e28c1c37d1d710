"""Distribution alignment: predictions whose mean is made to follow a prior over the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_prior(num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """1/C for every class, [classes], fp32: where an average starts, or what it is aligned with."""
    return torch.full((num_classes,), 1 / num_classes, device=device)


def moved(average: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """A moving average one step on: momentum * average + (1 - momentum) * mean."""
    return average.lerp(mean, 1 - momentum)


def aligned(logits: Tensor, mean: Tensor, prior: Tensor) -> Tensor:
    """N(p * prior / mean) of each row, [rows, classes], where N makes a row sum to 1.

    `mean` [classes] is the moving average of p over the unlabelled rows. Computed as the softmax of
    z + log prior - log mean, which neither overflows nor divides by 0 for a class that nobody
    predicts.
    """
    tiny = torch.finfo(torch.float32).tiny
    shift = prior.clamp(min=tiny).log() - mean.clamp(min=tiny).log()
    return (logits + shift).softmax(dim=-1)
