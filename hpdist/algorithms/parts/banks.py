"""Rows remembered over steps, up to a given number, the newest first.

A bank is a few tensors [size, *] of an algorithm's state, the same on every rank. An empty slot
holds zeros and must be ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = -1e9  # finite, so that 0 times it is 0


def enqueued(
    bank: Sequence[Tensor], kept: Tensor, rows: Sequence[Tensor], valid: Tensor
) -> tuple[Tensor, ...]:
    """Put new rows in front of the old ones; rows beyond the size are dropped.

    Only rows of the bank [size, *] that are `kept`, bool [size], stay; only new rows [rows, *]
    that are `valid`, bool [rows], enter.
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

    The rest have a share of 0; if none is counted, the result must not be used.
    """
    return similarities.masked_fill(~counted, _LOW).log_softmax(dim=-1)


def with_mean(means: Tensor, mean: Tensor) -> Tensor:
    """Put the mean [classes] of this step in front of a bank of distributions [size, classes]."""
    (found,) = enqueued([means], in_use(means), [mean[None]], torch.ones_like(mean[:1]) > 0)
    return found


def mean_of(means: Tensor) -> Tensor:
    """The mean [classes] of a bank of distributions [size, classes], over the slots in use."""
    return means.sum(dim=0) / in_use(means).sum().clamp(min=1)


def in_use(distributions: Tensor) -> Tensor:
    """Which rows [rows, classes] are distributions and not empty slots; bool [rows]."""
    return distributions.sum(dim=1) > 0.5
