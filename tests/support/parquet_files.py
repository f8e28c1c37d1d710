"""Real Parquet files with rows that say which they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpdist.data.files.open import Retry
from hpdist.data.stream.index import Index
from hpdist.data.stream.index_build import build_index
from hpdist.data.stream.reader import Reader


def write_numbers(folder: Path, groups: Sequence[Sequence[int]], **options: Any) -> list[Path]:
    """One file per entry, of row groups of these sizes; row i holds the vector [i, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, at = [], 0
    for number, sizes in enumerate(groups):
        path = folder / f"train-{number:05d}.parquet"
        schema = pa.schema({"x": pa.list_(pa.float32()), "label": pa.int64()})
        with pq.ParquetWriter(path, schema, **options) as writer:
            for size in sizes:
                rows = range(at, at + size)
                columns = {"x": [[float(row), 1.0] for row in rows], "label": [r % 3 for r in rows]}
                writer.write_table(pa.table(columns, schema=schema))
                at += size
        paths.append(path)
    return paths


def index_of(paths: Sequence[Path | str], split: str = "train", column: str = "x") -> Index:
    files = {"train": [str(path) for path in paths]}
    return build_index(files, split, [column], "data.unlabeled", Retry(deadline=5))


def ids_of(
    reader: Reader, position: int, batch: int, ranks: int = 1, only: int | None = None
) -> list[int]:
    """The ids of a global batch, as so many ranks read it, or only one of them."""
    ids: list[int] = []
    for rank in range(ranks) if only is None else [only]:
        start, stop = rank * batch // ranks, (rank + 1) * batch // ranks
        rows = reader.read(position, batch, start, stop)
        reader.prepare(position + batch, batch, start, stop)
        values = [] if rows.table is None else rows.table.column("x").to_pylist()
        assert [int(value[0]) for value in values] == rows.ids.tolist()  # its own row, not another
        ids += rows.ids.tolist()
    return ids
