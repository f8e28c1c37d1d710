"""Real Parquet files of small images that say which row they are, whole or damaged."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from hpdist.data.batch import UnlabeledBatch
from hpdist.data.config import Labeled, Loading, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.data.stream import BatchStream
from tests.support.labeled import open_labeled

SCHEMA = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
)
GROUPS = [[30, 20], [25], [40, 10, 15], [20, 20], [36]]  # rows of each row group of each file
ROWS = 216


@cache
def picture(row: int) -> bytes:
    """A PNG of 8 x 8 grey pixels, noise but for the first two, which name the row."""
    pixels = np.random.default_rng(row).integers(0, 256, (8, 8), np.uint8)
    pixels[0, :2] = divmod(row, 256)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_pictures(
    folder: Path,
    groups: Sequence[Sequence[int]] = GROUPS,
    *,
    values: dict[int, bytes | None] | None = None,
    **options: Any,
) -> list[Path]:
    """One file per entry, of row groups of these sizes; `values` stand in place of some images."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, at = [], 0
    for number, sizes in enumerate(groups):
        path = folder / f"train-{number:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, **options) as writer:
            for size in sizes:
                rows = range(at, at + size)
                images = [(values or {}).get(row, picture(row)) for row in rows]
                stored = [
                    None if image is None else {"bytes": image, "path": f"{row}.png"}
                    for row, image in zip(rows, images, strict=True)
                ]
                columns = {"image": stored, "label": [row % 5 for row in rows]}
                writer.write_table(pa.table(columns, SCHEMA))
                at += size
        paths.append(path)
    return paths


def rows_of(file: int, group: int | None = None) -> set[int]:
    """The ids of a file, or of one of its row groups, of files written by `GROUPS`."""
    start = sum(map(sum, GROUPS[:file]))
    if group is None:
        return set(range(start, start + sum(GROUPS[file])))
    start += sum(GROUPS[file][:group])
    return set(range(start, start + GROUPS[file][group]))


def rewrite(path: Path, content: bytes) -> None:
    """Put other bytes into a file as a failing disk does: size and time stay where they can."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def damage_page(path: Path, group: int, where: str, column: str = "image.bytes") -> None:
    """Spoil the header or the body of the page that holds a row group's column."""
    found = pq.read_metadata(path).row_group(group)
    chunks = [found.column(leaf) for leaf in range(found.num_columns)]
    (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    at = start if where == "header" else start + chunk.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[at : at + 4] = bytes(byte ^ 0x5A for byte in content[at : at + 4])
    rewrite(path, bytes(content))


@cache
def labeled() -> Any:
    """Labelled rows of the same kind."""
    images = [{"bytes": picture(1000 + row), "path": None} for row in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(
        {"image": images, "label": [row % 5 for row in range(10)]}, features=features
    )
    return open_labeled(Labeled(path="memory"), 0, dataset=table)


def opened(files: Iterable[Path | str], patience: float = 5.0, **settings: Any) -> ParquetRows:
    """Open them as a run does."""
    config = Unlabeled(
        path="parquet", data_files=[str(file) for file in files], streaming=True, **settings
    )
    spec = input_spec(labeled())
    rows = open_unlabeled(config, labeled(), spec, loading=Loading(patience=patience))
    assert isinstance(rows, ParquetRows)
    return rows


def stream_of(
    rows: ParquetRows, rank: int = 0, ranks: int = 1, batch: int = 24, position: int = 0
) -> BatchStream[UnlabeledBatch]:
    return BatchStream(rows, batch, rank, ranks, 0, input_spec(labeled()), position)


def take(
    rows: ParquetRows, count: int, rank: int = 0, ranks: int = 1, batch: int = 24, position: int = 0
) -> list[UnlabeledBatch]:
    stream = stream_of(rows, rank, ranks, batch, position)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def assert_same(found: Sequence[UnlabeledBatch], expected: Sequence[UnlabeledBatch]) -> None:
    """Every row is there, in its place, whole."""
    assert assert_same_but_masked(found, expected) == []


def assert_same_but_masked(
    found: Sequence[UnlabeledBatch], expected: Sequence[UnlabeledBatch]
) -> list[int]:
    """No row moved and every valid one has its values; gives the ids of the masked ones."""
    masked: list[int] = []
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.ids.tolist() == wanted.ids.tolist()
        assert batch.epochs is not None
        assert wanted.epochs is not None
        assert batch.epochs.tolist() == wanted.epochs.tolist()
        valid = torch.ones(len(batch)).bool() if batch.valid is None else batch.valid
        assert torch.equal(batch.inputs[valid], wanted.inputs[valid])
        assert not batch.inputs[~valid].any()
        assert [row.id for row in batch.bad] == batch.ids[~valid].tolist()
        masked += batch.ids[~valid].tolist()
    return masked
