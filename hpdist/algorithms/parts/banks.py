"""Rows remembered over steps: as many as there is room for, the newest first.

A bank is a few tensors [size, *] of an algorithm's state, the same on every rank. A place that is
still empty holds zeros, and must count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = -1e9  # finite, so that 0 times it is 0


def enqueued(
    bank: Sequence[Tensor], kept: Tensor, rows: Sequence[Tensor], valid: Tensor
) -> tuple[Tensor, ...]:
    """The bank with new rows in front of the old ones; what has no room any more falls out.

    Of the bank [size, *] only the rows that are `kept`, bool [size], stay; of the new ones [rows,
    *] only those come that are `valid`, bool [rows].
    """
    stays = torch.cat([valid, kept])
    order = stays.long().argsort(descending=True, stable=True)[: len(kept)]
    found = []
    for old, new in zip(bank, rows, strict=True):
        empty = ~stays[order].view(-1, *[1] * (old.dim() - 1))
        found.append(torch.cat([new, old])[order].masked_fill(empty, 0.0))
    return tuple(found)


def log_shares(similarities: Tensor, counted: Tensor) -> Tensor:
    """Log-softmax of each row [rows, others], over the others that are `counted`, bool [others].

    The rest have a share of 0; where none is counted, nothing is to be made of the result.
    """
    return similarities.masked_fill(~counted, _LOW).log_softmax(dim=-1)


def with_mean(means: Tensor, mean: Tensor) -> Tensor:
    """A bank of distributions [size, classes] with the mean [classes] of this step in front."""
    (found,) = enqueued([means], in_use(means), [mean[None]], torch.ones_like(mean[:1]) > 0)
    return found


def mean_of(means: Tensor) -> Tensor:
    """The mean [classes] of a bank of distributions [size, classes], over the places in use."""
    return means.sum(dim=0) / in_use(means).sum().clamp(min=1)


def in_use(distributions: Tensor) -> Tensor:
    """Which rows [rows, classes] are distributions, and not empty places; bool [rows]."""
    return distributions.sum(dim=1) > 0.5
