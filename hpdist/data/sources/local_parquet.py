"""Opens Parquet files of this machine: columns that they have in common, and those of folders."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.files.columns import Columns, common
from hpdist.data.files.partitions import Partitions, partitions
from hpdist.data.files.row_names import remember_files
from hpdist.data.files.unpacked import most_unpacked
from hpdist.data.sources.builders import UnlikeParquet
from hpdist.data.sources.held import hold_footer
from hpdist.data.sources.known_types import known_features, unknown_columns
from hpdist.data.sources.opening import Opening
from hpdist.data.sources.parquet_pieces import Pieces, spans_of
from hpdist.data.sources.parquet_table import ParquetTable
from hpdist.errors import ConfigError, DataError

_FOOTERS_AT_ONCE = 8


def open_parquet(opening: Opening) -> Any:
    """Open Parquet files, where they lie if that is asked for and can be, else as `datasets` does.

    Raises DataError where a file is damaged, or their columns do not go together.
    """
    found = dict(zip(opening.paths, _footers(opening), strict=True))
    full = {
        part: [path for path in paths if found[path].num_rows]
        for part, paths in opening.splits.items()
    }
    read = [path for paths in full.values() for path in paths]
    if not read:
        raise opening.no_rows()
    full = {part: paths or list(opening.splits[part])[:1] for part, paths in full.items()}
    folders = partitions(read, opening.base)
    columns = _parquet_columns({path: found[path] for path in read}, folders, opening)
    opening = replace(opening, splits=full)
    hollow = any(found[path].row_group(0).num_rows == 0 for path in read)  # `datasets` fails there
    names = opening.options.get("columns") or list(columns.features)
    features = datasets.Features({name: columns.features[name] for name in names})
    if _is_read_in_place(opening, features):
        opened = _in_place(opening, {path: found[path] for path in read}, features, folders)
    elif columns.differ or folders or hollow:
        opened = opening.build(UnlikeParquet, features=features, folders=folders)
    else:
        opened = opening.load()
    if not opening.streaming and "[" not in opening.split and not opening.options.get("filters"):
        remember_files(opened, [(path, found[path].num_rows) for path in opening.paths])
    return opened


def _is_read_in_place(opening: Opening, features: Any) -> bool:
    """Whether rows are read as `datasets` would give them, without its copy."""
    if opening.copied is None or opening.streaming or set(opening.options) - {"columns"}:
        return False
    return not any("." in name for name in features)  # which Parquet takes for a path


def _in_place(
    opening: Opening, found: Mapping[str, pq.FileMetaData], features: Any, folders: Partitions
) -> ParquetTable:
    names = list(features)
    for path, footer in found.items():
        hold_footer(path, footer, names)
    full = {part: [p for p in paths if p in found] for part, paths in opening.splits.items()}
    pieces = Pieces.of(spans_of(opening.split, full, found), found, names)
    assert opening.copied is not None
    return ParquetTable(pieces, features, folders, most_unpacked(), opening.copied)


def _parquet_columns(
    found: Mapping[str, pq.FileMetaData], folders: Partitions, opening: Opening
) -> Columns:
    """The columns that files have in common, with those that folders name."""
    features: dict[str, Any] = {}
    foreign = False
    last: tuple[pa.Schema, Any] | None = None  # most files are as the one before
    for path, footer in found.items():
        schema = footer.schema.to_arrow_schema()
        if last is None or not schema.equals(last[0], check_metadata=True):
            full = folders.added(plain_schema(schema))
            foreign = foreign or bool(unknown_columns(schema))
            for name, kind in unknown_columns(full).items():
                if name in opening.needed:
                    raise DataError(
                        f"{opening.where}: the column {name!r} is {kind} in {path}, which cannot "
                        "be read; write what it holds as lists or columns of their own"
                    )
            last = schema, known_features(full)
        features[path] = last[1]
    columns = common(features, opening.name)
    columns.require(opening.needed, opening.where)
    for name in opening.options.get("columns") or ():
        if name not in columns.features:
            raise ConfigError(
                f"{opening.where}.options: columns: there is no column {name!r}; there are "
                f"{', '.join(columns.features)}"
            )
    return replace(columns, differ=columns.differ or foreign)


def _footers(opening: Opening) -> list[pq.FileMetaData]:
    def footer(path: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{opening.name}: {path} is no Parquet file, or its end is damaged ({cause}); "
                "restore the file, or leave it out of data_files"
            ) from error

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="hpdist-footers") as pool:
        return list(pool.map(footer, opening.paths))
