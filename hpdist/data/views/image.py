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
from hpdist.data.structures import sent
from hpdist.data.views import rand_augment
from hpdist.data.views.base import ViewedRows, check_positions
from hpdist.data.views.geometry import Moves, Size, identity_maps
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
    input_kind: ClassVar[str] = "image"
    comes_first: ClassVar[bool] = True
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

    def plain_with_maps(self, x: Tensor) -> ViewedRows:
        """Normalise the images, which moves nothing. See `MappedViews`."""
        rows = self.plain(x)
        return _mapped(rows, _moves(x))

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Shift and flip the images at random, and normalise. See `Views`."""
        return self._weak(x, (stream, str(copy)), step, positions)

    def weak_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the weak view and the shift and flip that made it. See `MappedViews`."""
        moves = _moves(x)
        return _mapped(self._weak(x, (stream, str(copy)), step, positions, moves), moves)

    def _weak(
        self,
        x: Tensor,
        names: tuple[str, str],
        step: int,
        positions: Tensor,
        moves: Moves | None = None,
    ) -> Tensor:
        _check_images(x)
        check_positions(x, positions)
        noise = self._noise(("weak", *names), step, positions, 3)
        config = self.config.weak
        moved = shift_and_flip(x, noise, config.shift, config.flip, moves)
        return self._normalize(_to_unit(moved))

    def strong(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Shift, flip, RandAugment, cut out and normalise the images. See `Views`."""
        return self.graded(
            x, operations=_OPERATIONS, stream=stream, step=step, positions=positions, copy=copy
        )

    def strong_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the strong view and what moved its pixels. See `MappedViews`."""
        return self.graded_with_maps(
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
        return self._strong(x, operations, (stream, str(copy)), step, positions)[0]

    def graded_with_maps(
        self,
        x: Tensor,
        *,
        operations: int,
        stream: str,
        step: int,
        positions: Tensor,
        copy: int = 0,
    ) -> ViewedRows:
        """Return a graded strong view and what moved its pixels. See `MappedViews`."""
        moves = _moves(x)
        names = (stream, str(copy))
        rows, square = self._strong(x, operations, names, step, positions, moves)
        return _mapped(rows, moves, hidden_squares(square, moves.size, self.config.strong.cutout))

    def _strong(
        self,
        x: Tensor,
        operations: int,
        names: tuple[str, str],
        step: int,
        positions: Tensor,
        moves: Moves | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the strong view, and the noise [B, 2] that placed its grey squares."""
        _check_images(x)
        check_positions(x, positions)
        config = self.config.strong
        ops = operations if config.ops is None else config.ops
        count = 5 + ops * rand_augment.DRAWS
        noise = self._noise(("strong", *names), step, positions, count)
        place, square, policy = torch.split(noise, [3, 2, count - 5], dim=1)
        applied = None
        if config.probability < 1:
            coins = self._noise(("strong applied", *names), step, positions, ops)
            applied = coins < config.probability
        moved = shift_and_flip(x, place, self.strong_shift, self.strong_flip, moves)
        images = rand_augment.rand_augment(
            _to_unit(moved),
            policy.reshape(len(x), ops, rand_augment.DRAWS),
            self.operations,
            config.magnitude,
            applied,
            moves,
        )
        return self._normalize(cutout(images, square, config.cutout)), square

    def _noise(self, names: tuple[str, ...], step: int, positions: Tensor, count: int) -> Tensor:
        """Uniform numbers, float32 [B, count] on the CPU."""
        return random.uniform(self.seed, random.stream_id(*names), step, positions, count)

    def _normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation. Changes `images` in place."""
        mean = _per_channel("mean", self.config.mean or [0.5], images)
        std = _per_channel("std", self.config.std or [0.25], images)
        return images.sub_(mean).div_(std)


def shift_and_flip(
    x: Tensor, noise: Tensor, shift: float, flip: bool, moves: Moves | None = None
) -> Tensor:
    """Shift every image by whole pixels, with its border reflected, and flip half of them.

    Args:
        x: [B, C, H, W].
        noise: float32 [B, 3] on the CPU, uniform in [0, 1): vertical, horizontal, flip.
        shift: largest shift as a share of each side, rounded down to pixels.
        flip: whether to flip left to right.
        moves: what was done to the images before, to which flip and shift are added. They are those
            of the image itself: what the reflected border repeats has no map.

    """
    height, width = x.shape[2:]
    reach = torch.tensor([int(shift * height), int(shift * width)])
    offsets = (noise[:, :2] * (2 * reach + 1)).long() - reach  # [B, 2]
    flipped = (noise[:, 2:] < 0.5) if flip else torch.zeros(len(x), 1, dtype=torch.bool)
    plan = torch.cat((offsets, flipped.long()), dim=1)  # [B, 3]
    if moves is not None:
        moves.add(_shift_maps(plan, width))
    plan = sent(plan, x.device)
    rows = _reflected(height, plan[:, 0:1])  # [B, H]
    columns = _reflected(width, plan[:, 1:2])  # [B, W]
    columns = torch.where(plan[:, 2:] == 1, width - 1 - columns, columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # [B, H * W]
    source = pixels[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, source).view_as(x)


def _shift_maps(plan: Tensor, width: int) -> Tensor:
    """Return the maps of a shift after a flip, float64 [B, 2, 3].

    Args:
        plan: int64 [B, 3]: pixels up, pixels to the left, 1 where the image is flipped.
        width: width of the images.

    """
    up, left, flipped = plan.double().unbind(1)
    maps = identity_maps(len(plan), dtype=torch.float64)
    maps[:, 0, 0] = 1 - 2 * flipped
    maps[:, 0, 2] = width * flipped - left
    maps[:, 1, 2] = -up
    return maps


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
    height, width = images.shape[2:]
    starts, square = _squares(noise, (height, width), share)
    if square == 0:
        return images
    starts = sent(starts, images.device)
    rows = _within(height, starts[:, 0:1], square)  # [B, H]
    columns = _within(width, starts[:, 1:2], square)  # [B, W]
    hidden = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    return images.masked_fill(hidden, rand_augment.GREY)


def hidden_squares(noise: Tensor, size: Size, share: float) -> Tensor:
    """Return what `cutout` hides of every image: x0, y0, x1, y1, float32 [B, 4] on the CPU.

    Args:
        noise: as `cutout` takes it.
        size: height and width of the images.
        share: as `cutout` takes it; without a square all four numbers of a row are 0.

    """
    starts, square = _squares(noise, size, share)
    if square == 0:
        return torch.zeros(len(noise), 4)
    corners = torch.cat((starts, starts + square), dim=1)  # top, left, bottom, right
    ends = torch.tensor([size[0], size[1]] * 2)
    return corners.clamp(min=0).minimum(ends)[:, [1, 0, 3, 2]].float()


def _squares(noise: Tensor, size: Size, share: float) -> tuple[Tensor, int]:
    """Return the squares' first row and column, int64 [B, 2] on the CPU, and their side."""
    side = int(share * min(size))
    centres = (noise * torch.tensor(size)).long()  # [B, 2]
    return centres - side // 2, side


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


def _moves(x: Tensor) -> Moves:
    _check_images(x)
    return Moves(len(x), (x.shape[2], x.shape[3]))


def _mapped(rows: Tensor, moves: Moves, hidden: Tensor | None = None) -> ViewedRows:
    """Put a view and what moved its pixels together, on the view's device."""
    hidden = torch.zeros(len(rows), 4) if hidden is None else hidden
    numbers = torch.cat((moves.maps.flatten(1), moves.visible, hidden.double()), dim=1).float()
    maps, visible, hidden = sent(numbers, rows.device).split([6, 4, 4], dim=1)
    return ViewedRows(rows, maps.unflatten(1, (2, 3)), visible, hidden)


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
    return sent(torch.tensor(values), images.device).view(-1, 1, 1)
