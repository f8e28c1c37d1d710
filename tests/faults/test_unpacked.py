"""What `datasets` reads by itself: small files that stand for much are refused before that."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpdist.data.config import Loading, UnlabeledSource
from hpdist.data.files.unpacked import UnpackedError, unpacking
from hpdist.data.sources.loading import load_files
from hpdist.data.stream.blocks import read_blocks
from hpdist.data.stream.ipc import check_batches
from hpdist.errors import DataError
from tests.support.fault_table import Fault
from tests.support.memory import Peak

MIB = 2**20
MOST = 8 * MIB
TEXT = "a" * (2 * MIB)
LINE = json.dumps({"text": TEXT, "label": 1}) + "\n"
TIMES = 80  # 160 MiB in all


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def compressed(module: Any, name: str, *parts: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with module.open(folder / name, "wb") as file:
            for part in parts:
                file.write(part.encode())
        return folder / name

    return make


def dictionary(folder: Path) -> Path:
    """One value that all rows repeat."""
    few = pa.table({"text": [np.random.default_rng(0).bytes(MIB // 4).hex()] * 20})
    pq.write_table(pa.concat_tables([few] * 40), folder / "a.parquet", row_group_size=800)
    return folder / "a.parquet"


def row_groups(folder: Path) -> Path:
    """Each of them may be read, but not as many."""
    schema = pa.schema({"text": pa.string()})
    options: dict[str, Any] = {"use_dictionary": False, "compression": "zstd"}
    with pq.ParquetWriter(folder / "a.parquet", schema, write_statistics=False, **options) as out:
        for _ in range(TIMES):
            out.write_table(pa.table({"text": [TEXT]}))
    return folder / "a.parquet"


def rows(folder: Path) -> Path:
    kind = pa.list_(pa.float32())
    with pq.ParquetWriter(folder / "a.parquet", pa.schema({"x": kind})) as out:
        out.write_table(pa.table({"x": pa.nulls(20_000_000, kind)}), row_group_size=20_000_000)
    return folder / "a.parquet"


def unlike(folder: Path) -> Path:
    """Files of other columns, which a builder of our own reads."""
    pq.write_table(pa.table({"text": ["b"], "more": [1]}), folder / "b.parquet")
    dictionary(folder)
    return folder


def arrow(repeated: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        texts = pa.array([TEXT[:MIB]] * (1 if repeated else 160))
        if repeated:
            texts = pa.DictionaryArray.from_arrays(pa.array([0] * 160, pa.int32()), texts)
        table = pa.table({"text": texts})
        options = pa.ipc.IpcWriteOptions(compression=None if repeated else "zstd")
        with pa.ipc.new_file(folder / "a.arrow", table.schema, options=options) as out:
            out.write_table(table)
        return folder / "a.arrow"

    return make


def tar(mode: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / ("a.tar.gz" if mode == "w:gz" else "a.tar")
        (folder / "0.txt").touch()
        os.truncate(folder / "0.txt", TIMES * 2 * MIB)
        if mode == "w:gz":
            with tarfile.open(path, mode) as out:
                out.add(folder / "0.txt", "0.txt")
            return path
        member = tarfile.TarInfo("0.txt")  # a file that is a hole from its beginning to its end
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
        head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        size = b"%011o\0" % (TIMES * 2 * MIB)
        head[386:410] = size + b"%011o\0" % 0  # where the only piece begins, and its length
        head[483:495] = size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        path.write_bytes(bytes(head) + bytes(1024))
        return path

    return make


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.jsonl", LINE * TIMES)
    return folder / "a.zip"


BOMBS = {
    "lines of JSON, gzip": compressed(gzip, "a.jsonl.gz", *[LINE] * TIMES),
    "one line of JSON, gzip": compressed(gzip, "a.jsonl.gz", '{"text": "', *[TEXT] * TIMES, '"}'),
    "a list of JSON, xz": compressed(lzma, "a.json.xz", "[", *[LINE + ","] * TIMES, LINE + "]"),
    "CSV, bzip2": compressed(bz2, "a.csv.bz2", "text\n", *[TEXT + "\n"] * TIMES),
    "the header of CSV, gzip": compressed(gzip, "a.csv.gz", *[TEXT] * TIMES),
    "text, gzip": compressed(gzip, "a.txt.gz", *[TEXT] * TIMES),
    "a dictionary of Parquet": dictionary,
    "row groups of Parquet": row_groups,
    "rows of Parquet": rows,
    "Parquet files unlike one another": unlike,
    "buffers of Arrow, zstd": arrow(repeated=False),
    "a dictionary of Arrow": arrow(repeated=True),
    "holes in a tar file": tar("w"),
    "a tar file, gzip": tar("w:gz"),
    "a zip file": zipped,
}


def read(path: Path, streaming: bool, most: int) -> int:
    """Open a set as a config does, and count its rows."""
    loading = Loading(most_unpacked=most)
    named: dict[str, Any] = {"path": str(path)}
    if path.suffix == ".zip":  # what is in it is not looked for
        named = {"path": "json", "data_files": str(path)}
    source = UnlabeledSource(**named)
    found, _ = load_files(source, "data.unlabeled", streaming, loading=loading)
    if not streaming:
        return len(found)
    return sum(len(t) for _, t in read_blocks(found.with_format("arrow"), "data", 4, most=most))


@pytest.mark.sampled(rows="kind", columns="streaming", share=0.5)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_stands_for_much_is_not_read(
    kind: str, streaming: bool, tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    fault = inject("a small file that stands for much memory, read by `datasets`")
    path = BOMBS[kind](tmp_path)
    with Peak() as peak, pytest.raises(DataError, match=r"raise data\.loading\.most_unpacked"):
        read(path, streaming, MOST)
    assert peak.rise < 110  # of 160 and more
    fault.survived()


@pytest.mark.parametrize("kind", ["lines of JSON, gzip", "row groups of Parquet", "a zip file"])
def test_the_setting_allows_it(kind: str, tmp_path: Path) -> None:
    assert read(BOMBS[kind](tmp_path), False, 512 * MIB) == TIMES


def test_honest_files_are_read_whatever_the_limit(tmp_path: Path) -> None:
    words = [f"{number} {number**7}" for number in range(3000)]
    table = pa.table({"text": words, "label": [number % 3 for number in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    made = [
        tmp_path / "a.parquet",
        compressed(gzip, "a.jsonl.gz", lines)(tmp_path),
        compressed(bz2, "a.csv.bz2", "text\n", *[f"{word}\n" for word in words])(tmp_path),
    ]
    for path in made:
        for streaming in (False, True):
            assert read(path, streaming, 1) == 3000


def test_files_that_others_read_are_not_counted(tmp_path: Path) -> None:
    path = compressed(gzip, "a.txt.gz", TEXT)(tmp_path)
    with fsspec.open(path, compression="infer") as file:
        assert len(file.read()) == len(TEXT)
    with unpacking(MIB), fsspec.open(path, compression="infer") as file:
        read_all = file.read
        with pytest.raises(UnpackedError):
            read_all()
    with unpacking(4 * MIB), fsspec.open(path, "rt", compression="infer") as file:
        assert file.readline() == TEXT
        file.seek(0)
        assert len(file.read()) == len(TEXT)


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_damaged_arrow_files_are_errors_and_no_hang(codec: Any, kind: Any, tmp_path: Path) -> None:
    table = pa.table({"a": ["x" * 100] * 50, "b": pa.array(["q"] * 50).dictionary_encode()})
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with kind(tmp_path / "a.arrow", table.schema, options=options) as out:
        out.write_table(table, max_chunksize=20)
    whole = (tmp_path / "a.arrow").read_bytes()
    with pa.BufferReader(whole) as source:
        check_batches(source, MIB)
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole[: draw.choice([len(whole), draw.integers(len(whole))])])
        for at in draw.integers(len(data), size=3) if data else ():
            data[at] = draw.integers(256)
        with pa.BufferReader(bytes(data)) as source:
            try:
                check_batches(source, MIB)
            except (ValueError, UnpackedError):
                refused += 1
    assert refused > 50
