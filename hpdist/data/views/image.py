"""Weak and strong views of images: FixMatch's, batched on the images' device.

Weak: shift and flip. Strong: shift and flip, RandAugment, cutout. All noise is drawn on the CPU
from the counter-based generator, a few numbers per row; nothing is read back from the device.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from hpdist.config.component import Component
from hpdist.config.section import Section
from hpdist.data import random
from hpdist.data.views import rand_augment
from hpdist.data.views.base import check_positions
from hpdist.errors import ConfigError, DataError


class Weak(Section):
    """The weak view."""

    shift: float = Field(default=0.125, ge=0, le=1)
    """Largest shift up, down, left and right, as a share of the side; the border is reflected."""
    flip: bool = True
    """Flip half of the rows left to right; turn off where it changes the meaning, as of digits."""


class Strong(Section):
    """The strong view: the weak one's shift and flip, then RandAugment, then cutout."""

    ops: int | None = Field(default=None, ge=0, le=16)
    """How many of RandAugment's operations each row gets; by default 2, or what the algorithm's
    authors have for each of its strong views (sequencematch: 1 and 3)."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Chance of each of these operations to be applied; Google's FixMatch has 0.5 for ImageNet."""
    magnitude: float = Field(default=1.0, ge=0, le=1)
    """Factor on the range of every operation's strength."""
    cutout: float = Field(default=0.5, ge=0, le=1)
    """Side of the grey square, as a share of the shorter side; its centre is anywhere."""
    shift: float | None = Field(default=None, ge=0, le=1)
    """Largest shift; by default the weak view's."""
    flip: bool | None = None
    """Flip half of the rows; by default the weak view's."""
    exclude: list[str] = Field(default=[])
    """Names of RandAugment's operations not to draw."""

    @field_validator("exclude")
    @classmethod
    def _known_operations(cls, exclude: list[str]) -> list[str]:
        known = ", ".join(rand_augment.STRENGTHS)
        unknown = [name for name in exclude if name not in rand_augment.STRENGTHS]
        if unknown:
            raise ValueError(f"no operation is called {', '.join(unknown)}; known: {known}")
        if set(exclude) == set(rand_augment.STRENGTHS):
            raise ValueError("leaves no operation to draw; set views.strong.ops to 0 instead")
        return exclude


class ImageViewsConfig(Component):
    """Weak and strong views of images, as FixMatch makes them."""

    kind: ClassVar[str] = "views"
    name: Literal["image"] = "image"
    size: int | None = Field(default=None, gt=0)
    """Resize rows to size x size when they are read; by default to what the model was trained with
    (`hf:`, `timm:`), else they keep their size."""
    channels: Literal[1, 3, 4] | None = None
    """Channels that every picture is converted to: 1 grey, 3 colour, 4 with transparency; by
    default what `datasets` is told to decode, else what the labelled pictures are."""
    mean: list[float] | None = Field(default=None, min_length=1)
    """Subtracted from pixels in [0, 1]: one value per channel, or one for all; by default what the
    model was trained with (`hf:`, `timm:`), else 0.5."""
    std: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """What pixels are divided by, after the mean: one value per channel, or one for all; by default
    what the model was trained with, else 0.25."""
    weak: Weak = Weak()
    strong: Strong = Strong()

    def build(self, seed: int) -> ImageViews:
        """Build the views, with noise from this seed."""
        return ImageViews(self, seed)


_OPERATIONS = 2  # of FixMatch's RandAugment


class ImageViews:
    """The `Views` of images: uint8 [B, C, H, W] to normalised float32 [B, C, H, W]."""

    def __init__(self, config: ImageViewsConfig, seed: int) -> None:
        weak, strong = config.weak, config.strong
        self.seed = seed
        self.config = config
        self.operations = [name for name in rand_augment.STRENGTHS if name not in strong.exclude]
        self.strong_shift = weak.shift if strong.shift is None else strong.shift
        self.strong_flip = weak.flip if strong.flip is None else strong.flip

    def plain(self, x: Tensor) -> Tensor:
        """Normalise the images. See `Views`."""
        _check_images(x)
        return self._normalize(_to_unit(x))

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Shift and flip the images at random, and normalise. See `Views`."""
        _check_images(x)
        check_positions(x, positions)
        noise = self._noise(("weak", stream, str(copy)), step, positions, 3)
        config = self.config.weak
        return self._normalize(_to_unit(shift_and_flip(x, noise, config.shift, config.flip)))

    def strong(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Shift, flip, RandAugment, cut out and normalise the images. See `Views`."""
        return self.graded(
            x, operations=_OPERATIONS, stream=stream, step=step, positions=positions, copy=copy
        )

    def graded(
        self,
        x: Tensor,
        *,
        operations: int,
        stream: str,
        step: int,
        positions: Tensor,
        copy: int = 0,
    ) -> Tensor:
        """Make a strong view of so many operations, unless `strong.ops` says how many."""
        _check_images(x)
        check_positions(x, positions)
        config, names = self.config.strong, (stream, str(copy))
        ops = operations if config.ops is None else config.ops
        count = 5 + ops * rand_augment.DRAWS
        noise = self._noise(("strong", *names), step, positions, count)
        place, square, policy = torch.split(noise, [3, 2, count - 5], dim=1)
        applied = None
        if config.probability < 1:
            coins = self._noise(("strong applied", *names), step, positions, ops)
            applied = coins < config.probability
        images = _to_unit(shift_and_flip(x, place, self.strong_shift, self.strong_flip))
        images = rand_augment.rand_augment(
            images,
            policy.reshape(len(x), ops, rand_augment.DRAWS),
            self.operations,
            config.magnitude,
            applied,
        )
        return self._normalize(cutout(images, square, config.cutout))

    def _noise(self, names: tuple[str, ...], step: int, positions: Tensor, count: int) -> Tensor:
        """Uniform numbers, float32 [B, count] on the CPU."""
        return random.uniform(self.seed, random.stream_id(*names), step, positions, count)

    def _normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation. Changes `images` in place."""
        mean = _per_channel("mean", self.config.mean or [0.5], images)
        std = _per_channel("std", self.config.std or [0.25], images)
        return images.sub_(mean).div_(std)


def shift_and_flip(x: Tensor, noise: Tensor, shift: float, flip: bool) -> Tensor:
    """Shift every image by whole pixels, with its border reflected, and flip half of them.

    Args:
        x: [B, C, H, W].
        noise: float32 [B, 3] on the CPU, uniform in [0, 1): vertical, horizontal, flip.
        shift: largest shift as a share of each side, rounded down to pixels.
        flip: whether to flip left to right.

    """
    height, width = x.shape[2:]
    reach = torch.tensor([int(shift * height), int(shift * width)])
    offsets = (noise[:, :2] * (2 * reach + 1)).long() - reach  # [B, 2]
    flipped = (noise[:, 2:] < 0.5) if flip else torch.zeros(len(x), 1, dtype=torch.bool)
    plan = torch.cat((offsets, flipped.long()), dim=1).to(x.device, non_blocking=True)  # [B, 3]
    rows = _reflected(height, plan[:, 0:1])  # [B, H]
    columns = _reflected(width, plan[:, 1:2])  # [B, W]
    columns = torch.where(plan[:, 2:] == 1, width - 1 - columns, columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # [B, H * W]
    source = pixels[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, source).view_as(x)


def _reflected(side: int, offset: Tensor) -> Tensor:
    """Shift indices 0 to side - 1 by offset [B, 1], reflected at both ends: int64 [B, side]."""
    period = max(2 * (side - 1), 1)
    index = (torch.arange(side, device=offset.device) + offset) % period
    return torch.minimum(index, period - index) if side > 1 else index


def cutout(images: Tensor, noise: Tensor, share: float) -> Tensor:
    """Paint one grey square into every image; what sticks out over the border is lost.

    The side is fixed, as in FixMatch; only the centre is random.

    Args:
        images: float32 [B, C, H, W].
        noise: float32 [B, 2] on the CPU, uniform in [0, 1): the centre, vertical and horizontal.
        share: the square's side as a share of the image's shorter side, rounded down to pixels.

    """
    sides = images.shape[2:]
    square = int(share * min(sides))
    if square == 0:
        return images
    centres = (noise * torch.tensor(sides)).long()  # [B, 2]
    starts = (centres - square // 2).to(images.device, non_blocking=True)
    rows = _within(sides[0], starts[:, 0:1], square)  # [B, H]
    columns = _within(sides[1], starts[:, 1:2], square)  # [B, W]
    hidden = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    return images.masked_fill(hidden, rand_augment.GREY)


def _within(side: int, start: Tensor, length: int) -> Tensor:
    """Mark the indices of a side in [start, start + length), start [B, 1]: bool [B, side]."""
    index = torch.arange(side, device=start.device)
    return (index >= start) & (index < start + length)


def _check_images(x: Tensor) -> None:
    if x.dtype != torch.uint8 or x.dim() != 4:
        raise DataError(
            f"image views take uint8 rows [B, C, H, W], not {x.dtype} {list(x.shape)}; "
            "for rows that are not images set views.name to table or identity"
        )


def _to_unit(x: Tensor) -> Tensor:
    """Pixels in [0, 1], float32, from uint8."""
    return x.to(torch.float32).div_(255)


def _per_channel(setting: str, values: list[float], images: Tensor) -> Tensor:
    """Put a setting on the images' device, [1 or C, 1, 1]. Raises ConfigError."""
    channels = images.shape[1]
    if len(values) not in (1, channels):
        raise ConfigError(
            f"views.{setting} has {len(values)} values, but the rows have {channels} channels; "
            "give one value per channel, or one for all"
        )
    return torch.tensor(values).view(-1, 1, 1).to(images.device, non_blocking=True)
