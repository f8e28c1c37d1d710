"""Pictures inside of files that say less of themselves: what is decoded is bounded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpdist.data.files.named_files import Limits
from hpdist.data.kinds import spec_of_value
from hpdist.data.kinds.pictures import PictureCounts
from tests.support.memory import Peak


def packed_zeros(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((width // 8 + 1) * height), 9)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def icon(picture: bytes, kind: int = 1) -> bytes:
    """An icon of 16 x 16 by its table, which holds another picture."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, kind, 1) + entry + picture


def bitmap(width: int, height: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(64)


def tile(width: int, height: int) -> bytes:
    """A TIFF of 4 x 4 pixels in one tile of many."""
    data = zlib.compress(bytes(width * height))
    tags = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 0, 325: 0}
    tags |= {324: 10 + 12 * len(tags) + 4, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


INNER = {
    "icon of PNG": icon(packed_zeros(9008, 9008)),
    "icon of BMP": icon(bitmap(9008, 9008)),
    "cursor": icon(bitmap(9008, 9008), 2),
    "tile of TIFF": tile(9008, 9008),
}


@pytest.mark.parametrize("kind", INNER)
def test_a_picture_inside_of_a_picture_is_refused_by_its_own_header(kind: str) -> None:
    spec = spec_of_value(packed_zeros(16, 16), 16)
    out = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    with Peak() as peak:
        (reason,) = spec.decode_valid([INNER[kind]], out).values()
        if kind.startswith("icon"):
            counts = PictureCounts()
            counts.add(INNER[kind])
            assert not counts.pictures
    assert "9008 x 9008 pixels, more than 50000000" in reason
    assert "data.loading.most_pixels" in reason
    assert peak.rise < 30


def test_icons_of_usual_sizes_are_read(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"png": {}, "bmp": {"bitmap_format": "bmp"}}
    for ending, options in kinds.items():
        path = tmp_path / f"{ending}.ico"
        Image.new("RGB", (64, 64), (9, 8, 7)).save(path, sizes=[(16, 16), (64, 64)], **options)
        spec = spec_of_value(path.read_bytes(), None, limits=Limits(pixels=64 * 64))
        assert spec.shape[1:] == (64, 64)
        assert spec.decode(path.read_bytes())[0].eq(9).all()
