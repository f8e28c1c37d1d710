"""Building blocks of algorithms' heads: from a model's features to vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pool(nn.Module):
    """One vector per row: the mean over positions of maps [rows, C, ...] or tokens [rows, T, C]."""

    def forward(self, features: Tensor) -> Tensor:
        """[rows, C]."""
        if features.dim() == 3:
            return features.mean(dim=1)
        return features.flatten(2).mean(dim=2) if features.dim() > 3 else features


def pooled_size(features: torch.Size) -> int:
    """The length of `Pool`'s vectors, for features of a shape without the rows."""
    return features[1] if len(features) == 2 else features[0]


def projection(features: torch.Size, width: int, hidden: int | None = None) -> nn.Module:
    """Pooled features through one hidden layer to vectors [rows, width] of length 1."""
    size = pooled_size(features)
    hidden = hidden or size
    return nn.Sequential(
        Pool(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, width), UnitLength()
    )


def linear(features: torch.Size, width: int) -> nn.Module:
    """Pooled features through one linear layer to [rows, width]."""
    return nn.Sequential(Pool(), nn.Linear(pooled_size(features), width))


def flat_linear(features: torch.Size, width: int) -> nn.Module:
    """Flattened features through one linear layer to [rows, width]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(features), width))


class UnitLength(nn.Module):
    """Rows divided by their Euclidean length, in fp32."""

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, width] of length 1."""
        return F.normalize(rows.float(), dim=1)
