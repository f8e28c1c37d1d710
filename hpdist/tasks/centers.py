"""Objects as points: the targets, the loss and the decoding of a map of centres.

A model gives for every cell of a coarse grid over the view, by name:

    heat   [rows, classes, height, width]: logits of an object of each class with its centre there
    boxes  [rows, 4, height, width]: the centre's x and y from the middle of the cell, in cells, and
           the logarithms of the box's width and height, in cells

Boxes are x0, y0, x1, y1 as shares of the view, so that the grid may be of any size. Source: Zhou,
Wang and Kraehenbuehl 2019, "Objects as Points", arXiv:1904.07850, with logarithms of sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALPHA, BETA = 2, 4
"""The focal loss's exponents, of errors and of distances to a centre (the paper's section 3)."""
OVERLAP = 0.7
"""The overlap that a box has with one whose corners are displaced by the Gaussian's radius."""
SMOOTH = 0.1
"""Cells, or a logarithm, below which a box's loss is a square."""
_AT_ONCE = 16  # boxes of every row whose Gaussians are in memory together
_SMALLEST = 1 / 16  # of a cell: sides below it are learned as this, whose logarithm is finite
_LARGEST = 12.0  # a logarithm of a side in cells, so that its exponential is finite


class Detections(NamedTuple):
    """The peaks of the maps of some rows, best first."""

    boxes: Tensor
    """float32 [rows, most, 4], as shares of the view."""
    scores: Tensor
    """float32 [rows, most], in 0..1."""
    classes: Tensor
    """int64 [rows, most]."""


def gaussian_radius(width: Tensor, height: Tensor, overlap: float = OVERLAP) -> Tensor:
    """Return how far both corners of a box may be off for the IoU to stay above `overlap`.

    It is the least of three radii: both corners outside, both inside, and one of each. Source: Law
    and Deng 2018, "CornerNet", arXiv:1808.01244, section 3.2.
    """
    total, area = width + height, width * height

    def root(a: float, b: Tensor, c: Tensor) -> Tensor:
        """Return the root of a r^2 + b r + c that the radius grows to from 0."""
        return (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt()) / (2 * a)

    # Each polynomial is the overlap's condition, which holds at r = 0 and up to the root.
    inside = root(4.0, -2 * total, (1 - overlap) * area)
    shifted = root(1.0, -total, (1 - overlap) / (1 + overlap) * area)
    outside = root(-4 * overlap, -2 * overlap * total, (1 - overlap) * area)
    return torch.minimum(torch.minimum(inside, shifted), outside)


def heat_targets(
    boxes: Tensor, classes: Tensor, there: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Draw a Gaussian around every centre; where several of a class meet, the largest counts.

    Args:
        boxes: float32 [rows, n, 4], as shares of the view.
        classes: int64 [rows, n].
        there: bool [rows, n], which of them are boxes.
        shape: Classes, height and width of the map.

    Returns:
        float32 [rows, classes, height, width] in 0..1, exactly 1 in the cells of centres.

    """
    _, height, width = shape
    heat = boxes.new_zeros(len(boxes), *shape)
    for part in range(0, boxes.shape[1], _AT_ONCE):
        own = slice(part, part + _AT_ONCE)
        centres, sides = _in_cells(boxes[:, own], height, width)
        x, y = _cells(centres, height, width)
        radius = gaussian_radius(sides[..., 0], sides[..., 1]).floor()
        sigma = (2 * radius + 1) / 6  # [rows, n]
        across = _bell(x, sigma, width)  # [rows, n, width]
        down = _bell(y, sigma, height)
        drawn = down[..., :, None] * across[..., None, :] * there[:, own, None, None]
        index = classes[:, own, None, None].expand_as(drawn)
        heat.scatter_reduce_(1, index, drawn, "amax")
    return heat


def focal_loss(heat: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the penalty-reduced focal loss of every cell and class, [rows].

    Equation 1 of the paper, not divided by the number of objects. `weight` [rows, height, width]
    weighs cells that are no centres: 0 leaves out what nothing is known of.
    """
    p = heat.sigmoid()
    centre = targets == 1
    positive = -(1 - p).pow(ALPHA) * F.logsigmoid(heat)
    negative = -(1 - targets).pow(BETA) * p.pow(ALPHA) * F.logsigmoid(-heat)
    if weight is not None:
        negative = negative * weight[:, None]
    return torch.where(centre, positive, negative).sum(dim=(1, 2, 3))


def box_loss(numbers: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
    """Sum over a row's boxes the distance of the four numbers in their centres' cells, [rows].

    It is the L1 distance, but for differences below `SMOOTH`, whose gradient fades with them: a
    pseudo-box that the student itself has found must not push it by what rounding makes of 0.

    Args:
        numbers: The model's `boxes`, [rows, 4, height, width].
        boxes: float32 [rows, n, 4], as shares of the view.
        there: bool [rows, n], which of them are boxes.

    """
    height, width = numbers.shape[2:]
    centres, sides = _in_cells(boxes, height, width)
    x, y = _cells(centres, height, width)
    found = _at(numbers, y * width + x)  # [rows, n, 4]
    offsets = centres - torch.stack((x, y), dim=2) - 0.5
    wanted = torch.cat((offsets, sides.clamp(min=_SMALLEST).log()), dim=2)
    errors = F.smooth_l1_loss(found, wanted, reduction="none", beta=SMOOTH)
    return torch.where(there[..., None], errors, 0.0).sum(dim=(1, 2))


def decode(heat: Tensor, numbers: Tensor, most: int) -> Detections:
    """Find the cells that no neighbour of their class exceeds, and the boxes around them.

    Args:
        heat: [rows, classes, height, width].
        numbers: The model's `boxes`, [rows, 4, height, width].
        most: How many of a row's are kept; fewer where the map has fewer cells.

    """
    height, width = heat.shape[2:]
    scores = heat.sigmoid()
    peaks = torch.where(F.max_pool2d(scores, 3, 1, 1) == scores, scores, 0.0).flatten(1)
    best, places = peaks.topk(min(most, peaks.shape[1]))
    classes, cells = places // (height * width), places % (height * width)
    found = _at(numbers, cells)
    cell = torch.stack((cells % width, cells // width), dim=2)
    ends = torch.tensor([width, height], dtype=torch.float32).to(heat.device)
    centres = (cell + 0.5 + found[..., :2]) / ends
    half = found[..., 2:].clamp(max=_LARGEST).exp() / ends / 2
    boxes = torch.cat((centres - half, centres + half), dim=2).clamp(0, 1)
    return Detections(boxes, best, classes)


def cells_in(boxes: Tensor, there: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which cells have their middle in one of a row's boxes, bool [rows, height, width]."""
    height, width = size
    x, y = (_middles(length, boxes) for length in (width, height))
    low, high = boxes[..., :2, None], boxes[..., 2:, None]  # [rows, n, 2, 1]
    across = (x >= low[:, :, 0]) & (x < high[:, :, 0]) & there[..., None]  # [rows, n, width]
    down = (y >= low[:, :, 1]) & (y < high[:, :, 1])
    return torch.einsum("rnh,rnw->rhw", down.float(), across.float()) > 0


def _middles(length: int, like: Tensor) -> Tensor:
    return (torch.arange(length, device=like.device) + 0.5) / length


def _in_cells(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return centres, and widths and heights, of boxes in cells, [rows, n, 2] each."""
    ends = torch.tensor([width, height], dtype=boxes.dtype).to(boxes.device)
    low, high = boxes[..., :2] * ends, boxes[..., 2:] * ends
    return (low + high) / 2, high - low


def _cells(centres: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the column and the row of the cells that centres lie in, int64 [rows, n] each."""
    x, y = centres.floor().long().unbind(2)
    return x.clamp(0, width - 1), y.clamp(0, height - 1)


def _bell(centre: Tensor, sigma: Tensor, length: int) -> Tensor:
    """Return exp(-d^2 / (2 sigma^2)) of the cells along one side, [rows, n, length]."""
    distances = torch.arange(length, device=centre.device) - centre[..., None]
    return (-distances.square() / (2 * sigma[..., None].square())).exp()


def _at(numbers: Tensor, cells: Tensor) -> Tensor:
    """Take the four numbers of some cells, [rows, n, 4]."""
    index = cells[:, None].expand(-1, numbers.shape[1], -1)
    return numbers.flatten(2).gather(2, index).transpose(1, 2)
