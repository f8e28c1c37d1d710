"""ResizeMix: an image is shrunk and pasted into another, for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_mix(
    images: Tensor, others: Tensor, sides: Tensor, centres: Tensor, crop: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Paste the middle of `others` into `images`; the result, and each image's own share of it.

    Args:
        images: [rows, channels, height, width].
        others: The images that are pasted, of the same shape.
        sides: Of the pasted box, as a share of the image's sides, in [0, 1]: [rows].
        centres: Of the box, in [0, 1) of height and width: [rows, 2]. What reaches beyond the image
        is cut off; the rest shows the whole pasted image.
        crop: Share of the sides of `others` that the middle has.

    The pasted pixels are the nearest ones. A share is 1 - box / image, fp32 [rows].
    """
    height, width = images.shape[2:]
    top, rows = _span(height, sides, centres[:, 0])
    left, columns = _span(width, sides, centres[:, 1])
    inside_y, from_y = _source(height, top, rows, crop)  # [rows, height] each
    inside_x, from_x = _source(width, left, columns, crop)
    inside = inside_y[:, :, None] & inside_x[:, None, :]  # [rows, height, width]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    pasted = others[batch, :, from_y[:, :, None], from_x[:, None, :]]  # [rows, height, width, C]
    mixed = torch.where(inside[:, None], pasted.permute(0, 3, 1, 2), images)
    return mixed, 1 - (rows * columns).float() / (height * width)


def _span(length: int, sides: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The start and length of a box along one side of an image, int64 [rows]."""
    wanted = (sides * length).long()
    begin = (centres * length).long() - wanted // 2
    end = (begin + wanted).clamp(max=length)
    begin = begin.clamp(min=0)
    return begin, end - begin


def _source(length: int, begin: Tensor, size: Tensor, crop: float) -> tuple[Tensor, Tensor]:
    """The places of one side that lie in the box, and the source pixel of each."""
    cropped = max(int(length * crop), 1)
    offsets = torch.arange(length, device=begin.device) - begin[:, None]  # [rows, length]
    inside = (offsets >= 0) & (offsets < size[:, None])
    nearest = offsets * cropped // size.clamp(min=1)[:, None]
    return inside, torch.where(inside, nearest, 0) + (length - cropped) // 2
