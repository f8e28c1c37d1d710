"""Normalisation layers by name."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

NormName = Literal["batch", "group"]


def make_norm(name: NormName, channels: int, momentum: float = 0.1) -> nn.Module:
    """BatchNorm over the global batch, or GroupNorm, which uses each row alone."""
    if name == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels, momentum=momentum)
