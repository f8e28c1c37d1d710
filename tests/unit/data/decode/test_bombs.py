"""Small files that stand for much: what they claim is checked before room is made for it."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from hpdist.data.decode.audio import Sampling
from hpdist.data.decode.text import Tokenizer
from hpdist.data.files.named_files import Limits
from hpdist.data.kinds import spec_of_value
from hpdist.data.sources.duplicates import _Digests, _Found
from hpdist.data.stream.bounded import TooLargeError, read_within
from hpdist.data.stream.claims import chunk_span
from hpdist.data.stream.footers import Footer
from hpdist.data.stream.index import Index
from hpdist.data.stream.pages import BadPageError, pages
from hpdist.data.stream.parquet import ParquetReader
from hpdist.errors import DataError
from tests.support.memory import Peak
from tests.support.parquet_files import index_of, write_numbers
from tests.support.texts import write_model

MIB = 2**20
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def written(path: Path, values: Any, kind: pa.DataType = PICTURE, **options: Any) -> Path:
    pq.write_table(pa.table({"x": pa.array(values, kind)}), path, **options)
    return path


def reader(index: Index, budget: int = 64 * MIB) -> ParquetReader:
    return ParquetReader(index, ["x"], "data.unlabeled", 0, 8, budget=budget)


@pytest.mark.parametrize("kind", [PICTURE, pa.binary(), pa.list_(pa.binary())])
def test_a_dictionary_that_rows_repeat_is_not_spelled_out(kind: Any, tmp_path: Path) -> None:
    value: Any = np.random.default_rng(0).bytes(MIB // 2)
    if pa.types.is_struct(kind):
        value = {"bytes": value, "path": None}
    elif pa.types.is_list(kind):
        value = [value]
    few = pa.table({"x": pa.array([value] * 20, kind)})
    pq.write_table(pa.concat_tables([few] * 25), tmp_path / "bomb.parquet", row_group_size=500)
    assert (tmp_path / "bomb.parquet").stat().st_size < MIB  # of 250 MiB
    index = index_of([tmp_path / "bomb.parquet"])
    with Peak() as peak:
        opened = reader(index)
        rows = opened.read(0, 8, 0, 8)
        opened.close()
    assert peak.rise < 100
    assert list(rows.unread) == list(range(8))
    assert "bytes of memory or more" in rows.unread[0]
    assert "shuffle_window" in rows.unread[0]
    allowed = reader(index, 600 * MIB)
    assert not allowed.read(0, 1, 0, 1).unread
    allowed.close()


def test_a_dictionary_with_one_long_value_is_read_as_ever(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(300)]
    held = [{"bytes": name.encode() * 3, "path": name} for name in names]
    held[7] = {"bytes": bytes(MIB // 2), "path": None}
    held[8] = {"bytes": None, "path": "a"}
    path = written(tmp_path / "a.parquet", [*held, None])
    opened = reader(index_of([path]))
    rows = opened.read(0, 301, 0, 301)
    opened.close()
    assert not rows.unread
    read = rows.table.column("x").to_pylist()
    assert [read[line] for line in np.argsort(rows.ids)] == [*held, None]


def test_compressed_zeros_are_refused_by_the_footer(tmp_path: Path) -> None:
    zeros = {"bytes": bytes(40 * MIB), "path": None}
    path = written(tmp_path / "a.parquet", [zeros, zeros], compression="zstd", use_dictionary=False)
    assert path.stat().st_size < MIB
    with pytest.raises(DataError, match=r"row group 0.* bytes of memory.*raise shuffle_window"):
        reader(index_of([path]))
    opened = reader(index_of([path]), 200 * MIB)
    assert not opened.read(0, 1, 0, 1).unread
    opened.close()


def test_pages_that_hold_more_than_the_footer_says_are_not_read(tmp_path: Path) -> None:
    large = written(
        tmp_path / "a.parquet",
        [bytes(80 * MIB)],
        pa.binary(),
        compression="zstd",
        use_dictionary=False,
    )
    plain: dict[str, Any] = {"use_dictionary": False, "compression": "none"}
    plain["write_statistics"] = False
    honest = written(tmp_path / "b.parquet", [b"a" * 300], pa.binary(), **plain)
    lying = pq.read_metadata(honest)
    with Peak() as peak, pa.OSFile(str(large)) as source, pytest.raises(TooLargeError):
        read_within(pq.ParquetFile(source, metadata=lying), source, 0, ["x"], MIB)
    assert peak.rise < 40
    many = written(tmp_path / "c.parquet", [b"a" * 40] * 9, pa.binary(), **plain)
    with pa.OSFile(str(many)) as source, pytest.raises(pa.ArrowInvalid, match="9 values"):
        read_within(pq.ParquetFile(source, metadata=lying), source, 0, ["x"], MIB)


@pytest.mark.parametrize("claimed", [2_000_000, 20_000_000])
def test_rows_that_a_footer_only_claims_cost_nothing(claimed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kind = pa.list_(pa.float32())
    with pq.ParquetWriter(path, pa.schema({"x": kind})) as writer:
        writer.write_table(pa.table({"x": pa.nulls(claimed, kind)}), row_group_size=claimed)
    assert path.stat().st_size < MIB
    with Peak() as peak, pytest.raises(DataError, match=f"row group 0.* {claimed * 100} bytes"):
        reader(index_of([path]))
    assert peak.rise < 40


def test_rows_of_a_damaged_row_group_are_named_as_they_are_asked_for(tmp_path: Path) -> None:
    (path,) = write_numbers(tmp_path, [[400_000, 5]], write_page_checksum=True)
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 4000)
    index = index_of([path])
    opened = ParquetReader(index, ["x"], "data", 0, 8)
    with Peak() as peak:
        rows = [opened.read(at, 8, 0, 8) for at in range(0, 80, 8)]
    opened.close()
    assert peak.rise < 100  # a dictionary of the rows alone has more
    assert sum(len(part.unread) for part in rows) >= 75  # of 80; the other group is whole


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_page_headers_add_up_to_what_an_honest_footer_says(
    version: str, codec: str, tmp_path: Path
) -> None:
    rows = [{"bytes": bytes([n % 251]) * 900, "path": f"{n % 7}" * 9} for n in range(900)]
    path = written(
        tmp_path / "a.parquet",
        rows,
        compression=codec,
        data_page_version=version,
        data_page_size=4096,
        write_page_checksum=True,
        dictionary_pagesize_limit=50_000,
    )
    data, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    for number in range(group.num_columns):
        chunk = group.column(number)
        start, end = chunk_span(chunk)
        found = list(pages(lambda a, b: data[a:b], start, end))
        assert sum(page.values for page in found if not page.dictionary) == len(rows)
        assert sum(page.dictionary for page in found) == chunk.has_dictionary_page
        size = sum(page.size for page in found)
        assert size <= chunk.total_uncompressed_size <= size + 4000 * len(found)  # with headers
    for damage in (
        b"\x00" * 50,
        b"\xff" * 50,
        b"\x1c" * 5000,
        b"\x19" * 5000,
        b"\x19\xfc" + b"\xff" * 50,
    ):
        with pytest.raises(BadPageError):
            list(pages(lambda a, b, d=damage: d[a:b], 0, len(damage)))


class _Claims:
    """A footer whose numbers are changed."""

    def __init__(self, inner: Any, changed: dict[str, Any]) -> None:
        self._inner, self._changed = inner, changed

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name, getattr(self._inner, name))

    def row_group(self, number: int) -> _Claims:
        return _Claims(self._inner.row_group(number), self._changed)

    def column(self, number: int) -> _Claims:
        return _Claims(self._inner.column(number), self._changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_rows": -1}, "has -1 rows"),
        ({"num_rows": 2**62, "num_values": 2**62}, "rows"),
        ({"num_rows": 7}, "7 rows"),
        ({"num_values": 4}, "4 values"),
        ({"num_values": -5}, "-5 values"),
        ({"total_uncompressed_size": -1}, "-1 bytes"),
        ({"total_compressed_size": -9}, "lies at bytes"),
        ({"total_compressed_size": 1 << 40}, "lies at bytes"),
        ({"data_page_offset": -4}, "lies at bytes"),
        ({"data_page_offset": 1 << 50, "has_dictionary_page": False}, "lies at bytes"),
        ({"data_page_offset": 9, "has_dictionary_page": False}, "overlap"),
    ],
)
def test_claims_that_cannot_be_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(10))}), path, row_group_size=5)
    metadata, size = pq.read_metadata(path), path.stat().st_size
    assert Footer.of("", metadata, ["x"], size).rows.tolist() == [5, 5]
    with pytest.raises(ValueError, match=message):
        Footer.of("", _Claims(metadata, changed), ["x"], size)


FUZZ = """
import random, sys, warnings
from pathlib import Path
from hpdist.data.stream.parquet import ParquetReader
from hpdist.errors import DataError
from tests.support.parquet_files import index_of
folder, whole = Path(sys.argv[1]), Path(sys.argv[1], "whole.parquet").read_bytes()
length = int.from_bytes(whole[-8:-4], "little")
outcomes = {"refused": 0, "masked": 0, "read": 0}
for seed in range(250):
    draw, data = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[len(whole) - 8 - draw.randrange(length) - 1] = draw.randrange(256)
    path = folder / f"{seed}.parquet"
    path.write_bytes(data)
    try:
        reader = ParquetReader(index_of([path]), ["x"], "data", 0, 8, budget=1 << 26)
        rows = reader.read(0, 8, 0, 8)
        reader.close()
        outcomes["masked" if rows.unread else "read"] += 1
    except DataError:
        outcomes["refused"] += 1
print(outcomes)
"""


def test_no_damaged_footer_ends_the_process(tmp_path: Path) -> None:
    rows = [{"bytes": bytes([n]) * 50, "path": f"{n}.png"} for n in range(40)]
    written(tmp_path / "whole.parquet", rows, row_group_size=10)
    command = [sys.executable, "-c", FUZZ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'refused': 0" not in done.stdout


def png(width: int, height: int) -> bytes:
    """A PNG of one byte of data, whatever its header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(kind: str, **options: Any) -> bytearray:
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, kind, **options)
    return bytearray(out.getvalue())


def large_headers() -> dict[str, bytes]:
    """Images of 8000 x 8000 by their headers."""
    gif, bmp, jpeg = saved("GIF"), saved("BMP"), saved("JPEG")
    gif[6:10] = struct.pack("<HH", 8000, 8000)
    bmp[18:26] = struct.pack("<ii", 8000, 8000)
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 8000, 8000)
    images = {"PNG": png(8000, 8000), "GIF": bytes(gif), "BMP": bytes(bmp), "JPEG": bytes(jpeg)}
    return images | {"PPM": b"P5 8000 8000 255\n\0"}


@pytest.mark.parametrize("kind", large_headers())
@pytest.mark.parametrize("size", [None, 4])
def test_an_image_is_refused_by_its_header(kind: str, size: int | None) -> None:
    data = large_headers()[kind]
    spec = spec_of_value(bytes(saved("PNG")), size)
    with Peak() as peak:
        out = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        (reason,) = spec.decode_valid([{"bytes": data, "path": None}], out).values()
        with pytest.raises(ValueError, match=r"8000 x 8000 pixels.*most_pixels"):
            spec_of_value(data, size)
    assert "8000 x 8000 pixels, more than 50000000" in reason
    assert "data.loading.most_pixels" in reason
    assert peak.rise < 20
    if kind != "PNG":  # which is read to the end for its orientation
        allowed = spec_of_value(data, None, limits=Limits(pixels=10**8))
        assert allowed.shape[1:] == (8000, 8000)


def test_an_image_that_is_a_program_is_not_run() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nquit\n"
    with pytest.raises(ValueError, match="EPS, a program"):
        spec_of_value(data, None)


def test_values_beyond_the_limit_of_bytes_are_refused() -> None:
    data = bytes(saved("PNG"))
    limits = Limits(bytes=len(data) - 1)
    with pytest.raises(ValueError, match=rf"{len(data)} bytes, more than .*most_bytes"):
        spec_of_value(data, None, limits=limits)


def test_a_sound_is_refused_by_its_header() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((64_000, 2), np.float32), 8000, format="WAV")
    wav = bytearray(out.getvalue())
    wav[24:28] = struct.pack("<I", 2**31 - 1)  # its rate: a row of a second is all it holds
    good, sampling = out.getvalue(), Sampling(8000, 8000)
    row = np.empty(8000, np.float32)
    limits = Limits(samples=20_000)
    sampling.decode_into(good, row, limits)
    assert not row.any()
    with pytest.raises(ValueError, match=r"128000 samples, more than 20000.*most_samples"):
        sampling.decode_into(bytes(wav), row, limits)


def test_a_text_without_end_is_cut_before_it_is_tokenized(tmp_path: Path) -> None:
    write_model(tmp_path / "bert")
    tokenizer = Tokenizer(str(tmp_path / "bert"), 16)
    start = "the film was good " * 4000
    short = tokenizer.encode([start])
    with Peak() as peak:
        long = tokenizer.encode([start * 60])
    assert (long == short).all()
    assert peak.rise < 60


def test_duplicates_take_25_bytes_of_a_row() -> None:
    rows = 400_000
    numbers = np.random.default_rng(0).integers(0, 256, (rows, 16), np.uint8)
    with Peak() as peak:
        known = _Digests.of((numbers[row].tobytes(), row) for row in range(rows))
        found = _Found(known)
    assert peak.rise * MIB < 110 * rows  # lists and dictionaries take more than 200
    held = known.digest.nbytes + known.row.nbytes + found._found.nbytes
    assert held == 25 * rows
    some = np.frombuffer(numbers[[5, 9, 5]].tobytes() + bytes(16), "S16")
    assert found.look(some) == [(0, 5), (1, 9)]
    assert found.count == 2
