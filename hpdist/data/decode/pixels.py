"""Images as pixels: encoded ones and arrays become uint8 [channels, height, width].

They stay so until the views run on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
from PIL import UnidentifiedImageError

from hpdist.data.decode.arrays import Arrays, shown_shape
from hpdist.data.decode.encoded import Array, Unreadable, mean_bytes
from hpdist.data.decode.image import CHANNELS, mode_of, open_image, part_pixels, pixels_of
from hpdist.data.decode.spec import ArraySpec, require_shape, require_value
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.messages.human import counted

_THREADS_PAY_PIXELS = 128 * 128  # below it, Pillow holds the interpreter's lock most of the time
_THREADS_PAY_BYTES = 4096  # likewise of encoded images whose stored size is not the spec's


@dataclass(frozen=True)
class ImageSpec(ArraySpec):
    """Rows are uint8 [channels, height, width].

    Every image is converted to `mode`, whatever its own: L is 8-bit grey (of 16 bits the upper
    eight are kept), RGB, or RGBA. Images of 32-bit floats are refused.
    """

    kind: ClassVar[str] = "image"
    array_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint8)
    shape: tuple[int, ...]
    stored: Literal["encoded", "array"]
    mode: str | None = None
    """L, RGB or RGBA."""
    channels_last: bool = False
    """How 3-D arrays are stored."""
    size: int | None = None
    """Every image is resized to size x size."""
    limits: Limits = USUAL_LIMITS
    """What a row may take to decode."""

    @classmethod
    def of(
        cls,
        value: Any,
        size: int | None = None,
        mode: str | None = None,
        limits: Limits = USUAL_LIMITS,
    ) -> ImageSpec:
        """Derive the spec from the first labelled row's value, as `stored_values` gives it.

        Without a `mode`, that of encoded images is what this one is by itself; see `mode_of`.
        Raises ValueError when the value is neither an image nor an array that can be one, or is
        beyond the limits.
        """
        if value is None or isinstance(value, Unreadable):
            raise ValueError(value.reason if value else "the value is null")
        if not isinstance(value, np.ndarray):
            image = open_image(value, limits)
            found = mode_of(image)  # refuses what no mode can be made of
            mode = mode or found
            height, width = (size, size) if size else (image.height, image.width)
            shape = (CHANNELS[mode], height, width)
            return cls(shape, "encoded", mode, size=size, limits=limits)
        channels_last = value.ndim == 3 and value.shape[2] in CHANNELS.values()
        channels, height, width = _to_channels_first(value, channels_last).shape
        modes = {count: mode for mode, count in CHANNELS.items()}
        if channels not in modes:
            raise ValueError(
                f"an array of shape {shown_shape(value.shape)} is no image: it must be height x "
                "width, height x width x channels or channels x height x width with 1, 3 or 4 "
                "channels"
            )
        shape = (channels, size or height, size or width)
        return cls(shape, "array", modes[channels], channels_last, size, limits)

    def with_mode(self, mode: str) -> ImageSpec:
        """Give the spec of images that are decoded in a mode."""
        return replace(self, mode=mode, shape=(CHANNELS[mode], *self.shape[1:]))

    @property
    def worth_processes(self) -> bool:
        """Whether they are encoded."""
        return self.stored == "encoded"

    def threads_pay(self, values: Sequence[Any]) -> bool:
        """Tell whether images are large enough for it."""
        if self.stored != "encoded":
            return False
        if self.size is None:
            return self.shape[1] * self.shape[2] >= _THREADS_PAY_PIXELS
        return mean_bytes(values) >= _THREADS_PAY_BYTES

    def describe(self) -> str:
        """Say what a row is, for the opening lines of a run."""
        channels, height, width = self.shape
        mode = f" ({self.mode})" if self.mode else ""
        return f"images of {height} x {width} pixels, {counted(channels, 'channel')}{mode}"

    def reason(self, error: Exception) -> str:
        """Say in one line why an image cannot be decoded, in every run alike."""
        if isinstance(error, UnidentifiedImageError):  # whose message holds an address in memory
            return "it is not an image that Pillow knows"
        return super().reason(error)

    def decode_row(self, value: Any, out: Arrays) -> None:
        """Decode an image. Raises ValueError, or what the image library raises."""
        require_value(value, is_array=self.stored == "array")
        out = cast(Array, out)
        if self.stored == "encoded":
            pixels = pixels_of(open_image(value, self.limits), str(self.mode))
            if pixels.shape[:2] == self.shape[1:]:
                part_pixels(pixels, out)
                return
            array = pixels.transpose(2, 0, 1)[: self.shape[0]]  # [channels, height, width]
        else:
            array = _bytes_of(_to_channels_first(value, self.channels_last))
        fits = array.shape[0] == self.shape[0]
        if self.size and fits:
            array = _resize(array, self.size)
        require_shape(array, self.shape, " (set views.size to resize every image)" if fits else "")
        out[...] = array


def _to_channels_first(array: Array, channels_last: bool) -> Array:
    """[height, width] or 3-D to [channels, height, width]."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(
            f"an array of shape {shown_shape(array.shape)} is no image: give 2 or 3 dimensions"
        )
    return np.moveaxis(array, -1, 0) if channels_last else array


def _bytes_of(array: Array) -> Array:
    """Integer values in 0..255 as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iufb":
        raise ValueError(f"an image of {array.dtype} is not one of numbers")
    with np.errstate(invalid="ignore"):  # NaN fails the comparison below
        as_bytes = array.astype(np.uint8)
    if not np.array_equal(as_bytes, array):
        raise ValueError(
            "its pixels are not whole numbers in 0..255: scale and store them as uint8"
        )
    return as_bytes


def _resize(image: Array, size: int) -> Array:
    """uint8 [channels, height, width] to [channels, size, size], bilinear and antialiased."""
    if image.shape[1:] == (size, size):
        return image
    import torch

    # Channels last in memory, since torch fails on channels first where size is 1. A copy, since
    # torch warns of read-only arrays.
    pixels = torch.from_numpy(np.array(image.transpose(1, 2, 0), order="C")).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        pixels[None], (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].numpy()
