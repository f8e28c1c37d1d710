"""Parquet files to read from, as `datasets` writes images: uncompressed, plain, with statistics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpdist.data.files.open import Retry
from hpdist.data.stream.index import Index
from hpdist.data.stream.index_build import build_index

COLUMN = "image"
FEATURES = datasets.Features({COLUMN: datasets.Image(decode=False)})
SCHEMA = FEATURES.arrow_schema
SMALLEST, LARGEST = 900, 1150  # bytes of a row


def write_file(
    path: Path, rows: int, group: int, first: int, *, row_statistics: bool = True
) -> None:
    """Random bytes, which no compression shrinks; the path of row i is `i.jpg`."""
    random = np.random.default_rng(first)
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression="none",
        use_dictionary=False,
        write_statistics=row_statistics,
    ) as writer:
        for at in range(0, rows, group):
            sizes = random.integers(SMALLEST, LARGEST, min(group, rows - at))
            ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            content = [None, pa.py_buffer(ends), pa.py_buffer(random.bytes(int(ends[-1])))]
            names = [f"{first + at + row}.jpg" for row in range(len(sizes))]
            stored = pa.StructArray.from_arrays(
                [pa.Array.from_buffers(pa.binary(), len(sizes), content), pa.array(names)],
                ["bytes", "path"],
            )
            writer.write_table(pa.table({COLUMN: stored}, schema=SCHEMA))


def write_shards(folder: Path, rows: int, shards: int, group: int) -> list[Path]:
    """Shards of uneven size, in row groups of `group` rows but for the last of each."""
    random = np.random.default_rng(0)
    parts = 0.5 + random.random(shards)
    ends = np.floor(np.cumsum(parts) / parts.sum() * rows + 1e-6).astype(int)
    paths = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        paths.append(folder / f"train-{number:05d}.parquet")
        write_file(paths[-1], int(end - start), group, int(start))
    return paths


def index_of(paths: Sequence[Path]) -> Index:
    """The index, from its cache where there is one."""
    files = {"train": [str(path) for path in paths]}
    return build_index(files, "train", [COLUMN], "data.unlabeled", Retry())


def stream_of(paths: Sequence[Path]) -> Any:
    """The rows as `datasets` streams them, undecoded."""
    found = datasets.load_dataset(
        "parquet",
        data_files={"train": [str(path) for path in paths]},
        split="train",
        streaming=True,
    )
    return found.cast_column(COLUMN, datasets.Image(decode=False))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
