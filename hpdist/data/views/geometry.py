"""Affine maps of pixel coordinates, which views give along, and labels that move with them.

Coordinates are (x, y) in pixels: x to the right and y down, from the outer corner at the top left.
The pixel in column i and row j covers x from i to i + 1 and y from j to j + 1, so its centre is at
(i + 0.5, j + 0.5), and a picture of height H and width W ends at x = W and y = H. Boxes in COCO's
and Pascal VOC's files are meant this way, and so are PIL's affine matrices.

A map is [2, 3], with one for every row: [rows, 2, 3]. The point (x, y) of the first picture is
found in the second at map @ (x, y, 1). Sizes are (height, width), as in a tensor's shape.

Everything here is elementwise, so that a row's result does not depend on the rows beside it, and
that autocast and TF32 do not round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = 255
"""What a moved mask holds where the first picture has no pixel, and what losses leave out."""

Size = tuple[int, int]
"""Height and width in pixels."""


def identity_maps(
    rows: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return maps that move nothing, [rows, 2, 3]."""
    return torch.eye(2, 3, dtype=dtype, device=device).repeat(rows, 1, 1)


def resize_maps(sizes: Tensor, size: Size) -> Tensor:
    """Return the maps from pictures of many sizes to the one that all of them are resized to.

    `views.size` resizes pictures as they are read, before any view, and this is the map of it.

    Args:
        sizes: height and width of every picture before, [rows, 2], of any dtype.
        size: height and width after.

    Returns:
        float32 [rows, 2, 3], on the device of `sizes`.

    """
    maps = identity_maps(len(sizes), device=sizes.device)
    maps[:, 0, 0] = size[1] / sizes[:, 1].to(torch.float32)
    maps[:, 1, 1] = size[0] / sizes[:, 0].to(torch.float32)
    return maps


def compose(maps: Sequence[Tensor]) -> Tensor:
    """Return the maps that apply the given ones one after another, the first one first.

    Args:
        maps: at least one tensor [rows, 2, 3], all of the same dtype and device.

    """
    return reduce(_then, maps)


def _then(first: Tensor, second: Tensor) -> Tensor:
    linear = second[:, :, 0:1] * first[:, 0:1] + second[:, :, 1:2] * first[:, 1:2]  # [rows, 2, 3]
    return torch.cat((linear[:, :, :2], linear[:, :, 2:] + second[:, :, 2:]), dim=2)


def invert(maps: Tensor) -> Tensor:
    """Return the maps back, [rows, 2, 3].

    Every map that views make can be inverted. The inverse of one that flattens the picture to a
    line holds NaN or infinity.
    """
    (a, b, x), (c, d, y) = (row.unbind(1) for row in maps.unbind(1))
    area = a * d - b * c  # of what a pixel becomes
    back_x = torch.stack((d, -b, b * y - d * x), dim=1)
    back_y = torch.stack((-c, a, c * x - a * y), dim=1)
    return torch.stack((back_x, back_y), dim=1) / area[:, None, None]


def map_between(first: Tensor, second: Tensor) -> Tensor:
    """Return the maps from one view of a row to another view of the same row.

    A pseudo-label that was found in the weak view is moved to the strong view by
    `map_between(weak.maps, strong.maps)`.

    Args:
        first: maps from the row to the view that the label was found in, [rows, 2, 3].
        second: maps from the row to the view that the label goes to, [rows, 2, 3].

    """
    return compose([invert(first), second])


def move_points(points: Tensor, maps: Tensor) -> Tensor:
    """Move points, such as keypoints, along. Points may come to lie outside the picture.

    Args:
        points: x and y, floating point [rows, n, 2].
        maps: [rows, 2, 3], on the same device.

    Returns:
        float32 [rows, n, 2].

    """
    _check_rows("points", points, maps, (None, 2))
    return _moved(points.to(torch.float32), maps)


def _moved(points: Tensor, maps: Tensor) -> Tensor:
    x, y = points.unbind(2)  # [rows, n]
    return torch.stack(
        [row[:, 0:1] * x + row[:, 1:2] * y + row[:, 2:] for row in maps.unbind(1)], 2
    )


def points_visible(
    points: Tensor,
    maps: Tensor,
    size: Size,
    *,
    visible: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return which points can be seen in the picture that they are moved to, bool [rows, n].

    Args:
        points: x and y before they are moved, floating point [rows, n, 2].
        maps: [rows, 2, 3], on the same device.
        size: height and width of the picture that the points are moved to.
        visible: as `move_boxes` takes it.
        hidden: as `move_boxes` takes it.

    """
    moved = move_points(points, maps)
    ends = torch.tensor([[0.0, 0.0, size[1], size[0]]]).to(maps.device)
    there = _within(moved, ends)
    if visible is not None:
        there &= _within(points, visible)
    return there if hidden is None else there & ~_within(moved, hidden)


def _within(points: Tensor, areas: Tensor) -> Tensor:
    """Return which points [rows, n, 2] lie in their row's area, [rows or 1, 4]: bool [rows, n]."""
    areas = areas[:, None]
    return ((points >= areas[:, :, :2]) & (points < areas[:, :, 2:])).all(dim=2)


class MovedBoxes(NamedTuple):
    """Boxes after a map, and how much of each is left to see."""

    boxes: Tensor
    """x0, y0, x1, y1, float32 [rows, n, 4]; 0 where a box is not kept."""
    kept: Tensor
    """Which boxes are kept, bool [rows, n]."""
    share: Tensor
    """How much of each moved box can be seen, between 0 and 1, float32 [rows, n]."""


def move_boxes(
    boxes: Tensor,
    maps: Tensor,
    size: Size,
    *,
    smallest_share: float = 0.0,
    visible: Tensor | None = None,
    hidden: Tensor | None = None,
) -> MovedBoxes:
    """Move boxes along: the bounding box of each one's moved corners, clipped to the picture.

    A box is kept where some of it can be seen, and of the whole moved box at least the smallest
    share. A box without area, such as the zeros that fill a row up, is not kept, and neither is
    one that holds NaN or infinity.

    Args:
        boxes: x0, y0, x1, y1, floating point [rows, n, 4].
        maps: [rows, 2, 3], on the same device.
        size: height and width of the picture that the boxes are moved to.
        smallest_share: the smallest share of a moved box that is to be seen, between 0 and 1.
        visible: the area of every row's picture before that is left in the new one, as `ViewedRows`
            has it, [rows, 4]. What lies outside is lost, wherever the map would put it.
        hidden: one area in every row's new picture that cannot be seen, as `ViewedRows` has it,
            [rows, 4]. It lowers the share and does not change a kept box.

    """
    _check_rows("boxes", boxes, maps, (None, 4))
    if not 0 <= smallest_share <= 1:
        raise ValueError(f"smallest_share must be between 0 and 1, not {smallest_share}")
    boxes = boxes.to(torch.float32)
    there = boxes.isfinite().all(dim=2) & (_area(boxes) > 0)
    whole = left = _around(boxes, maps)
    if visible is not None:
        inner = _overlap(boxes, visible)
        there &= _area(inner) > 0
        left = _around(inner, maps)
    ends = torch.tensor([[0.0, 0.0, size[1], size[0]]]).to(maps.device)
    clipped = _overlap(left, ends)
    left_area = _area(clipped)
    if hidden is not None:
        left_area = left_area - _area(_overlap(clipped, hidden))
    there &= left_area > 0
    share = torch.where(there, left_area / _area(whole), 0.0).clamp(max=1)
    kept = there & (share >= smallest_share)
    return MovedBoxes(torch.where(kept[:, :, None], clipped, 0.0), kept, share)


def _around(boxes: Tensor, maps: Tensor) -> Tensor:
    """Return the boxes around the moved corners of boxes [rows, n, 4]."""
    corners = boxes[:, :, [0, 1, 2, 1, 2, 3, 0, 3]].flatten(1).unflatten(1, (-1, 2))
    moved = _moved(corners, maps).unflatten(1, (boxes.shape[1], 4))  # [rows, n, 4, 2]
    return torch.cat((moved.amin(dim=2), moved.amax(dim=2)), dim=2)


def _overlap(boxes: Tensor, areas: Tensor) -> Tensor:
    """Cut boxes [rows, n, 4] to their row's area, [rows or 1, 4]."""
    low = torch.maximum(boxes[:, :, :2], areas[:, None, :2])
    return torch.cat((low, torch.minimum(boxes[:, :, 2:], areas[:, None, 2:])), dim=2)


def _area(boxes: Tensor) -> Tensor:
    """Return the areas of boxes, [rows, n]; 0 where an end lies before its beginning."""
    sides = (boxes[:, :, 2:] - boxes[:, :, :2]).clamp(min=0)
    return sides[:, :, 0] * sides[:, :, 1]


def move_masks(
    masks: Tensor,
    maps: Tensor,
    size: Size,
    *,
    fill: int = IGNORED,
    visible: Tensor | None = None,
) -> Tensor:
    """Move masks along: every pixel of the new mask takes the value of the nearest one before.

    Args:
        masks: a class for every pixel, whole numbers [rows, height, width]; bool with a `fill`.
        maps: [rows, 2, 3], on the same device.
        size: height and width of the picture that the masks are moved to.
        fill: the value of pixels that show nothing of the picture before.
        visible: as `move_boxes` takes it.

    Returns:
        [rows, *size], of the dtype of `masks`.

    """
    _check_rows("masks", masks, maps, (None, None))
    if masks.dtype == torch.bool and fill not in (0, 1):
        raise ValueError(f"bool masks have no value {fill}; give fill=False or fill=True")
    height, width = masks.shape[1:]
    x = torch.arange(size[1], device=maps.device, dtype=torch.float32) + 0.5
    y = torch.arange(size[0], device=maps.device, dtype=torch.float32)[:, None] + 0.5
    back = invert(maps)[:, :, :, None, None]  # [rows, 2, 3, 1, 1]
    source = back[:, :, 0] * x + back[:, :, 1] * y + back[:, :, 2]  # [rows, 2, *size]
    inside = torch.ones_like(source[:, 0], dtype=torch.bool)
    if visible is not None:
        inside = _within(source.flatten(2).mT, visible).view_as(inside)
    columns, lines = source.floor().unbind(1)  # compared as floats: int64 has no room for NaN
    inside &= (columns >= 0) & (columns < width) & (lines >= 0) & (lines < height)
    columns, lines = (torch.where(inside, index, 0.0).long() for index in (columns, lines))
    if masks.numel() == 0:
        return masks.new_full((len(masks), *size), fill)
    pixels = (lines * width + columns).flatten(1)
    found = masks.flatten(1).gather(1, pixels).view(len(masks), *size)
    return torch.where(inside, found, torch.full_like(found, fill))


class Moves:
    """What was done to the pictures of a batch so far, to which views add what they do.

    Everything is kept in float64 and on the CPU, where the noise is drawn.
    """

    def __init__(self, rows: int, size: Size) -> None:
        self.size = size
        self.maps = identity_maps(rows, dtype=torch.float64)
        """From the picture before everything to the picture now, [rows, 2, 3]."""
        self._frame = torch.tensor([[0, 0, size[1], size[0]]], dtype=torch.float64)
        self.visible = self._frame.repeat(rows, 1)
        """The area of the picture before that is left now, [rows, 4]. It is exact for flips, shifts
        and translations; of what turns and shears push over an edge, corners are still in it."""

    def add(self, maps: Tensor, rows: Tensor | None = None) -> None:
        """Add a map to every row, or to these rows, whose pictures keep their size.

        Args:
            maps: float64 [rows, 2, 3] on the CPU.
            rows: int64 [rows] on the CPU; by default all.

        """
        which = torch.arange(len(self.maps)) if rows is None else rows
        self.maps[which] = whole = compose([self.maps[which], maps])
        frames = self._frame.expand(len(which), 1, 4)
        left = _overlap(_around(frames, invert(whole)), self.visible[which])[:, 0]
        self.visible[which] = torch.cat((left[:, :2], left[:, 2:].maximum(left[:, :2])), dim=1)


def _check_rows(what: str, labels: Tensor, maps: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless there is a map for each row of labels, and both have their shapes."""
    fits = labels.dim() == 1 + len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, labels.shape[1:], strict=True)
    )
    if not fits or maps.shape != (len(labels), 2, 3):
        wanted_shape = ", ".join("n" if length is None else str(length) for length in shape)
        raise ValueError(
            f"{what} must be [rows, {wanted_shape}] with maps [rows, 2, 3], "
            f"not {list(labels.shape)} with {list(maps.shape)}"
        )
