"""Encoded images: opened within the limits, and parted into pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hpdist.data.decode.encoded import Array, stored_bytes
from hpdist.data.files.named_files import Limits

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PACKED = {"L": "L", "RGB": "RGBX", "RGBA": "RGBA"}  # as Pillow keeps them: packing only copies
_LARGE = 1 << 16  # packed bytes; for smaller images the plain copy is faster
_PROGRAMS = ("EPS",)  # formats that are programs, which Pillow has Ghostscript run
_MODES = {
    "1": "L",
    "L": "L",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "LA": "RGBA",
    "La": "RGBA",
    "PA": "RGBA",
}


def open_image(value: Any, limits: Limits) -> Image.Image:
    """Open an encoded image, turned the way its EXIF orientation says.

    Raises ValueError where its header says that it is larger than the limits allow, before any of
    it is decoded.
    """
    data = stored_bytes(value, "an image, a vector or an array", limits)
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.format in _PROGRAMS:
        raise ValueError(f"it is {image.format}, a program that draws: store it as PNG or JPEG")
    if image.width * image.height > limits.pixels:
        raise ValueError(
            f"its header says {image.width} x {image.height} pixels, more than {limits.pixels}; if "
            "that is right, raise data.loading.most_pixels"
        )
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return image  # Pillow would find no orientation, and make an empty Exif for every image
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image


def mode_of(image: Image.Image) -> str:
    """Say what one image by itself is decoded as: L of grey, RGBA with transparency, else RGB.

    Raises ValueError where its values have no range.
    """
    if image.mode in _SIXTEEN_BIT:
        return "L"
    if image.mode == "F":
        raise ValueError("32-bit float images have no fixed range: store them as 8-bit images")
    if "transparency" in image.info:
        return "RGBA"
    return _MODES.get(image.mode, "RGB")


def pixels_of(image: Image.Image, mode: str) -> Array:
    """Take the pixels in `mode`, uint8 [height, width, 1 or 4]; the fourth of RGB is padding."""
    if image.mode in _SIXTEEN_BIT:
        deep = np.asarray(image)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > 0xFFFF:
            raise ValueError("its grey values leave 0..65535: store it as an 8-bit image")
        image = Image.fromarray((deep >> 8).astype(np.uint8))  # convert("L") would clip at 255
    if image.mode == "F":
        raise ValueError("32-bit float images have no fixed range: store them as 8-bit images")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns and guesses
    if image.mode != mode:
        image = image.convert(mode)
    packed = np.frombuffer(image.tobytes("raw", _PACKED[mode]), np.uint8)  # read-only
    return packed.reshape(image.height, image.width, -1)


def part_pixels(pixels: Array, out: Array) -> None:
    """Part packed pixels, [height, width, 1 or 4], into `out`: [channels, height, width]."""
    if pixels.shape[2] == 1 or pixels.size < _LARGE or not out.flags.c_contiguous:
        for band in range(len(out)):
            out[band] = pixels[..., band]
        return
    # numpy copies every fourth byte one by one, but narrows words to their lowest byte many at a
    # time: twice as fast. The words of a band start at its byte, so the last pixel has none.
    channels, words_per_band = len(out), out[0].size - 1
    words: Array = np.ndarray((channels, words_per_band), "<u4", pixels, strides=(1, 4))
    np.copyto(out.reshape(channels, -1)[:, :-1], words, casting="unsafe")
    out[:, -1, -1] = pixels[-1, -1, :channels]
