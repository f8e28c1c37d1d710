"""Decoding many rows at once: what cannot be decoded is named and left out, the rest as ever."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hpdist.data.decode.encoded import Unreadable
from hpdist.data.kinds import spec_of_value


def encoded(seed: int, kind: str = "PNG", size: tuple[int, int] = (6, 5), turned: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


def test_rows_that_cannot_be_decoded_are_zeros_and_say_why():
    spec = spec_of_value(encoded(0), None)
    values = [
        encoded(1),
        None,
        b"",
        b"no image at all",
        encoded(2, "JPEG")[:-60],
        encoded(3, size=(9, 9)),
        Unreadable("its lists hold nulls"),
        np.zeros((3, 6, 5), np.uint8),
        {"bytes": encoded(4), "path": None},
    ]
    out = torch.full((len(values), *spec.shape), 7, dtype=torch.uint8)
    reasons = spec.decode_valid(values, out)
    assert list(reasons) == [1, 2, 3, 4, 5, 6, 7]
    assert reasons[1] == "the value is null"
    assert "truncated" in reasons[4].lower()
    assert "3x9x9" in reasons[5]
    assert reasons[6] == "its lists hold nulls"
    for line in reasons:
        assert not out[line].any()
    assert torch.equal(out[0], spec.decode(values[0]))
    assert torch.equal(out[8], spec.decode(encoded(4)))


def test_reasons_are_one_line_and_the_same_in_every_run():
    spec = spec_of_value(encoded(0), None)
    out = torch.empty((1, *spec.shape), dtype=torch.uint8)
    first, second = (spec.decode_valid([b"xx"], out)[0] for _ in range(2))
    assert first == second
    assert "0x" not in first


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_image_is_turned_as_its_exif_says(kind):
    flat = encoded(5, kind)
    turned = encoded(5, kind, turned=6)  # shown a quarter clockwise
    spec = spec_of_value(flat, None)
    upright = spec_of_value(turned, None).decode(turned)
    assert torch.equal(upright, spec.decode(flat).rot90(-1, (1, 2)))


@pytest.mark.parametrize("form", ["an attribute", "an element"])
def test_a_jpeg_is_turned_as_its_xmp_says(form):
    said = b' tiff:Orientation="6"' if form == "an attribute" else b"<tiff:Orientation>6<"
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded(5))).save(file, "JPEG")  # without EXIF
    flat = file.getvalue()
    segment = b"http://ns.adobe.com/xap/1.0/\x00" + said
    length = (len(segment) + 2).to_bytes(2, "big")
    turned = flat[:2] + b"\xff\xe1" + length + segment + flat[2:]
    upright = spec_of_value(turned, None).decode(turned)
    assert torch.equal(upright, spec_of_value(flat, None).decode(flat).rot90(-1, (1, 2)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (127, 128), (128, 128), (131, 301)])
def test_pixels_are_those_that_pillow_gives(mode, size):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (*size, *bands), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    expected = np.moveaxis(np.atleast_3d(pixels), -1, 0)
    spec = spec_of_value(file.getvalue(), None)
    assert np.array_equal(spec.decode(file.getvalue()).numpy(), expected)
    apart = np.zeros((1, *spec.shape[::-1]), np.uint8).transpose(0, 3, 2, 1)  # not contiguous
    assert not spec.decode_into([file.getvalue()], apart)
    assert np.array_equal(apart[0], expected)


def test_vectors_that_are_not_finite_are_left_out():
    spec = spec_of_value(np.arange(4.0), None)
    values = [np.array([1, np.nan, 2, 3]), np.array([1e300, 0, 0, 0]), np.arange(4), np.arange(3.0)]
    out = torch.full((4, 4), 7.0)
    assert list(spec.decode_valid(values, out)) == [0, 1, 3]
    assert out.tolist() == [[0] * 4, [0] * 4, [0, 1, 2, 3], [0] * 4]


def test_an_output_of_another_shape_is_refused():
    spec = spec_of_value(np.arange(4.0), None)
    with pytest.raises(ValueError, match="do not fit"):
        spec.decode_valid([np.arange(4.0)], torch.empty(2, 4))
