"""Encoded images: opened within the limits, and parted into pixels."""

from __future__ import annotations

import io
import struct
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hpdist.data.decode.encoded import Array, stored_bytes
from hpdist.data.files.named_files import Limits

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PACKED = {"L": "L", "RGB": "RGBX", "RGBA": "RGBA"}  # as Pillow keeps them: packing only copies
_LARGE = 1 << 16  # packed bytes; for smaller images the plain copy is faster
_PROGRAMS = ("EPS",)  # formats that are programs, which Pillow has Ghostscript run
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_ICON = struct.Struct("<HHH")  # reserved, 1 of icons or 2 of cursors, and how many pictures
_ICONS = ((0, 1), (0, 2))
_ENTRY = struct.Struct("<12sI")  # sizes and depths, and where the picture begins
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
    check_icon(io.BytesIO(data), limits)
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.format in _PROGRAMS:
        raise ValueError(f"it is {image.format}, a program that draws: store it as PNG or JPEG")
    _check_pixels(image.width, image.height, limits)
    if image.format == "TIFF":  # a tile is decoded whole, however small the image is
        tags = image.tag_v2  # type: ignore[attr-defined]
        _check_pixels(tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0), limits)
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return image  # Pillow would find no orientation, and make an empty Exif for every image
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image


def check_icon(file: IO[bytes], limits: Limits) -> None:
    """Raise ValueError where a picture in an icon file is larger than the limits allow.

    Such a file has a table of its pictures and their sizes, but Pillow goes by what each picture
    says of itself, and decodes the largest when it opens the file. The file's position stays.
    """
    start = file.tell()
    head = file.read(_ICON.size)
    if len(head) == _ICON.size and (found := _ICON.unpack(head))[:2] in _ICONS:
        entries = file.read(_ENTRY.size * found[2])
        for *_, at in _ENTRY.iter_unpack(entries[: len(entries) // _ENTRY.size * _ENTRY.size]):
            file.seek(start + at)
            picture = file.read(24)
            if picture.startswith(b"\x89PNG") and len(picture) == 24:
                width, height = struct.unpack(">II", picture[16:])
                _check_pixels(width, height, limits)
            elif len(picture) >= 12:
                width, height = struct.unpack("<ii", picture[4:12])
                _check_pixels(abs(width), abs(height) // 2, limits)  # with a mask below
    file.seek(start)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise ValueError(
            f"its header says {width} x {height} pixels, more than {limits.pixels}; if that is "
            "right, raise data.loading.most_pixels"
        )


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
