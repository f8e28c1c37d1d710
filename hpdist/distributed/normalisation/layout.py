"""How rows [rows, channels, *] lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def other_dims(rows: Tensor) -> list[int]:
    """All dimensions except that of the channels."""
    return [dim for dim in range(rows.dim()) if dim != 1]


def by_channel(values: Tensor, rows: Tensor) -> Tensor:
    """A view of [channels] that is broadcast over the rows."""
    return values.view(1, -1, *[1] * (rows.dim() - 2))


def dense(rows: Tensor) -> Tensor:
    """The rows in one of the two layouts that kernels are made for."""
    return rows if rows.is_contiguous() or _is_channels_last(rows) else rows.contiguous()


def dense_like(grad: Tensor, rows: Tensor) -> Tensor:
    """A gradient towards dense rows, in the layout of these."""
    if grad.stride() == rows.stride():
        return grad
    if rows.is_contiguous():
        return grad.contiguous()
    last = torch.channels_last if rows.dim() == 4 else torch.channels_last_3d
    return grad.contiguous(memory_format=last)


def _is_channels_last(rows: Tensor) -> bool:
    if rows.dim() == 4:
        return rows.is_contiguous(memory_format=torch.channels_last)
    return rows.dim() == 5 and rows.is_contiguous(memory_format=torch.channels_last_3d)
