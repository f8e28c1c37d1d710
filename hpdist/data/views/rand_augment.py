"""RandAugment with a policy of its own for every image, batched on the images' device.

The operations and their ranges are FixMatch's (Sohn et al. 2020, appendix), and each means what it
means in PIL, but in float and for any number of channels. Two things differ by design: warps shear
about the centre of the image and interpolate linearly, and what they uncover is grey.

Which image gets which operation is drawn on the CPU and known there, so that rows are grouped by
operation without waiting for the device. Every operation is elementwise, or a reduction that is
exact in any order (minimum, maximum, sum of integers): a row's result is the same to the last bit
whatever rows are beside it. That is why the operations are written here: library versions use
convolutions, matrix products and float sums, which round by batch size and drop to half precision
under autocast or to TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdist.data.structures import sent
from hpdist.data.views.geometry import Moves, Size, invert

GREY = 0.5
"""What uncovered and cut-out pixels become, of [0, 1]."""
DRAWS = 3
"""Uniform numbers that one operation on one image uses: which, how strong, which sign."""
STRENGTHS: dict[str, tuple[float, float]] = {
    "identity": (0, 0),
    "autocontrast": (0, 0),
    "equalize": (0, 0),
    "brightness": (0.05, 0.95),  # share of black
    "color": (0.05, 0.95),  # share of grey
    "contrast": (0.05, 0.95),  # share of the mean
    "posterize": (0, 5),  # bits dropped, rounded down: 0 to 4
    "rotate": (0, 30),  # degrees, either way
    "sharpness": (0.05, 0.95),  # share of the smoothed image
    "shear_x": (0, 0.3),  # columns per row, either way
    "shear_y": (0, 0.3),  # rows per column, either way
    "solarize": (0, 1),  # 1 - threshold
    "translate_x": (0, 0.3),  # of the width, either way
    "translate_y": (0, 0.3),  # of the height, either way
}
"""The operations and the range of their strength at magnitude 1."""
WARPS = frozenset(("rotate", "shear_x", "shear_y", "translate_x", "translate_y"))
"""The operations that move pixels; all rows that drew one are warped together."""


def rand_augment(
    images: Tensor,
    noise: Tensor,
    operations: Sequence[str],
    magnitude: float,
    applied: Tensor | None = None,
    moves: Moves | None = None,
) -> Tensor:
    """Apply random operations to every image, one after another. Changes `images` in place.

    Args:
        images: float32 [B, C, H, W] in [0, 1].
        noise: float32 [B, ops, DRAWS] on the CPU, uniform in [0, 1).
        operations: names out of `STRENGTHS` to draw from, each as likely as the others.
        magnitude: factor on every strength, in [0, 1]; at 0 most operations change nothing.
        applied: bool [B, ops] on the CPU, which of the operations an image gets; by default all.
        moves: what was done to the images before, to which every warp is added.

    Returns:
        `images`.

    """
    operations = sorted(operations, key=lambda name: name in WARPS)  # warps last, side by side
    for number, draws in enumerate(noise.unbind(1)):
        skipped = None if applied is None else ~applied[:, number]
        _apply_one_each(images, draws, operations, magnitude, skipped, moves)
    return images


def _apply_one_each(
    images: Tensor,
    draws: Tensor,
    operations: Sequence[str],
    magnitude: float,
    skipped: Tensor | None,
    moves: Moves | None,
) -> None:
    """Apply one operation to every image that is not skipped; `draws` is [B, DRAWS] on the CPU."""
    choice = (draws[:, 0] * len(operations)).long()  # [B]
    if skipped is not None:
        choice = (choice + 1).masked_fill(skipped, 0)
        operations = ["identity", *operations]
    order = choice.argsort(stable=True)  # rows of the same operation side by side
    choice, draws = choice[order], draws[order]
    strength = _strengths(choice, draws, operations, magnitude)  # [B]
    counts = choice.bincount(minlength=len(operations)).tolist()

    rows = sent(order, images.device)
    strengths = sent(strength, images.device).view(-1, 1, 1, 1)
    groups = zip(operations, torch.split(rows, counts), torch.split(strengths, counts), strict=True)
    for name, row, amount in groups:
        if name in PIXELWISE and len(row):
            images.index_copy_(0, row, PIXELWISE[name](images.index_select(0, row), amount))

    first = sum(count for name, count in zip(operations, counts, strict=True) if name not in WARPS)
    if first < len(order):
        names = [operations[index] for index in choice[first:].tolist()]
        matrices = affine_matrices(names, strength[first:] * _signs(draws[first:]))
        warped = warp(images.index_select(0, rows[first:]), matrices)
        images.index_copy_(0, rows[first:], warped)
        if moves is not None:
            moves.add(warp_maps(matrices, moves.size), order[first:])


def _strengths(
    choice: Tensor, draws: Tensor, operations: Sequence[str], magnitude: float
) -> Tensor:
    """Strengths [B], uniform in the range of each row's operation, times the magnitude."""
    low = torch.tensor([STRENGTHS[name][0] for name in operations])[choice]
    high = torch.tensor([STRENGTHS[name][1] for name in operations])[choice]
    return (low + (high - low) * draws[:, 1]) * magnitude


def _signs(draws: Tensor) -> Tensor:
    """-1 or 1 for every row, [B]."""
    return torch.where(draws[:, 2] < 0.5, -1.0, 1.0)


# Pixel operations: images [N, C, H, W] in [0, 1] and strengths [N, 1, 1, 1] to images in [0, 1].


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch every channel to the whole of [0, 1]; a flat channel stays."""
    low = images.amin(dim=(2, 3), keepdim=True)
    span = images.amax(dim=(2, 3), keepdim=True) - low
    return torch.where(span > 0, (images - low) / span, images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Flatten the histogram of every channel, over 256 levels, as PIL does.

    As with PIL, a channel of fewer than 256 pixels, an 8 x 8 image for example, stays as it is.
    """
    levels = _levels(images).flatten(2).flatten(0, 1)  # [P, H * W], P = N * C planes
    ones = torch.ones_like(levels)
    counts = levels.new_zeros(len(levels), 256).scatter_add_(1, levels, ones)
    last = counts.gather(1, levels.amax(dim=1, keepdim=True))  # pixels on the brightest level used
    step = (levels.shape[1] - last) // 255  # [P, 1], pixels per level wanted
    below = counts.cumsum(dim=1) - counts
    table = (below + step // 2) // step.clamp(min=1)  # [P, 256]
    mapped = table.clamp(max=255).gather(1, levels).to(images.dtype) / 255
    return torch.where(step == 0, images.flatten(2).flatten(0, 1), mapped).view_as(images)


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with black."""
    return images * (1 - strength)


def color(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with the image's own grey: less saturation. A one-channel image stays."""
    return _blend(images, grey(images), strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with the mean of the image's grey."""
    pixels = images.shape[2] * images.shape[3]
    total = _levels(grey(images)).sum(dim=(2, 3), keepdim=True)  # integers, so exact in any order
    return _blend(images, total.to(images.dtype) / (255 * pixels), strength)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the highest bits of the 8; `strength`, rounded down, is the number of bits dropped."""
    kept = torch.exp2(strength.floor()).long()
    levels = _levels(images)
    return torch.where(kept == 1, images, (levels - levels % kept).to(images.dtype) / 255)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with a smoothed image; the outermost pixels stay, so images thinner than 3 do too."""
    columns = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    box = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    inner = images[..., 1:-1, 1:-1]
    result = images.clone()
    result[..., 1:-1, 1:-1] = _blend(inner, (box + 4 * inner) / 13, strength)
    return result


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert the pixels above a threshold, which falls from 1 to 0 as the strength grows."""
    return torch.where(images * 255 < 256 * (1 - strength), images, 1 - images)


def grey(images: Tensor) -> Tensor:
    """Return the lightness, [N, 1, H, W]: ITU-R 601 luma for RGB, else the channels' mean."""
    channels = images.unbind(1)
    if len(channels) == 1:
        return images
    weights = (0.299, 0.587, 0.114) if len(channels) == 3 else (1 / len(channels),) * len(channels)
    parts = [channel * weight for channel, weight in zip(channels, weights, strict=True)]
    return reduce(torch.add, parts).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Blend from `images` at strength 0 to `other` at 1, never outside the range of the two."""
    return images * (1 - strength) + other * strength


def _levels(images: Tensor) -> Tensor:
    """Round to the nearest of 256 levels, int64."""
    return (images * 255).round().clamp(0, 255).long()


PIXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "posterize": posterize,
    "sharpness": sharpness,
    "solarize": solarize,
}


# Warps: one affine map for each row, from a place in the result to the place in the image it shows.


def affine_matrices(names: Sequence[str], amounts: Tensor) -> Tensor:
    """Build the affine map of every row's warp.

    Args:
        names: names out of `WARPS`, N of them.
        amounts: [N] on the CPU, in the unit of each warp, signed; signs as in PIL: rotations are
            counter-clockwise, translations move the image to the left and up.

    Returns:
        float32 [N, 2, 3]: x and y of the source from (x, y, 1) of the target, in pixels from the
        centre; the last column is in widths and heights.

    """
    amounts = amounts.double()  # the last bit of a float32 cosine may vary with the length

    def of(warp_name: str) -> Tensor:
        return torch.where(torch.tensor([name == warp_name for name in names]), amounts, 0.0)

    angle = of("rotate") * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x_row = torch.stack((cos, of("shear_x") - sin, of("translate_x")), dim=-1)
    y_row = torch.stack((of("shear_y") + sin, cos, of("translate_y")), dim=-1)
    return torch.stack((x_row, y_row), dim=1).float()


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Warp every image by its own affine map; linear interpolation, grey outside the image.

    Args:
        images: float32 [N, C, H, W] in [0, 1].
        matrices: float32 [N, 2, 3] on the CPU; see `affine_matrices`.

    """
    height, width = images.shape[2:]
    # grid_sample counts from -1 to 1 between the outer edges, so offsets in widths count double and
    # the cross terms change their unit.
    unit = torch.tensor([[1, height / width, 2], [width / height, 1, 2]])
    parameters = sent(matrices * unit, images.device)
    x = _centres(width, images)
    y = _centres(height, images)[:, None]
    source = parameters[:, :, None, None]  # [N, 2, 1, 1, 3]
    grid = source[..., 0] * x + source[..., 1] * y + source[..., 2]  # [N, 2, H, W]
    shifted = F.grid_sample(
        images - GREY, grid.movedim(1, -1), padding_mode="zeros", align_corners=False
    )
    return (shifted + GREY).clamp_(0, 1)


def warp_maps(matrices: Tensor, size: Size) -> Tensor:
    """Return the maps that `warp` moves pixels by, from the image to the result.

    Args:
        matrices: float32 [N, 2, 3] on the CPU; see `affine_matrices`.
        size: height and width of the images.

    Returns:
        float64 [N, 2, 3] on the CPU, as `geometry` defines maps.

    """
    linear, offset = matrices.double().split([2, 1], dim=2)  # [N, 2, 2], [N, 2, 1]
    sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
    centre = sides / 2
    turned = linear[:, :, 0] * centre[0] + linear[:, :, 1] * centre[1]  # [N, 2]
    start = offset[:, :, 0] * sides + centre - turned
    return invert(torch.cat((linear, start[:, :, None]), dim=2))


def _centres(side: int, like: Tensor) -> Tensor:
    """Place the pixel centres of a side between its outer edges, -1 and 1: [side]."""
    return (torch.arange(side, device=like.device, dtype=like.dtype) * 2 + (1 - side)) / side
