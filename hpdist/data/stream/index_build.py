"""Finds the row groups of a Parquet dataset from the footers of its files.

    files = split_files({"train": ["a.parquet", "b.parquet"]}, "train[:90%]", "data.unlabeled")
    index = build_index(files, "train[:90%]", ["image"], "data.unlabeled (…)", Retry())

Costs one small read per file, side by side, and nothing at the next start: the result is kept on
disk under the files' versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.files.columns import wider
from hpdist.data.files.open import FileVersion, Retry, redacted
from hpdist.data.files.partitions import Partitions
from hpdist.data.files.splits import check_known, names_in, spelled_out
from hpdist.data.stream import claims
from hpdist.data.stream.footers import Footer, Requests
from hpdist.data.stream.index import DataFile, Index, Parts
from hpdist.data.stream.index_cache import GROUP_ARRAYS, Groups, cache_file, keep, load
from hpdist.errors import DataError
from hpdist.messages.progress import working

T = TypeVar("T")

_REQUESTS = 32  # files that are asked at once


def split_files(
    available: Mapping[str, Sequence[str]], split: str, where: str
) -> dict[str, Sequence[str]]:
    """The files of every split that a split specification such as `train[:90%]` names, in order.

    Raises DataError.
    """
    split = spelled_out(split, available)
    check_known(split, available, where)
    return {part: available[part] for part in names_in(split)}


def build_index(
    splits: Mapping[str, Sequence[str]],
    split: str,
    columns: Sequence[str] | Callable[[pa.Schema], Sequence[str]],
    name: str,
    retry: Retry,
    folders: Partitions | None = None,
) -> Index:
    """Read the footers of all files, or what an earlier start kept of them.

    Args:
        splits: The files of every split that `split` names.
        split: Which rows, slices allowed.
        columns: The columns that will be read, or what chooses them by the schema of the first file
            that has rows.
        name: Of the dataset, for messages.
        retry: How long a server may fail.
        folders: The columns that the files' folders name.

    Raises DataError where a file is missing, damaged, lacks a column that is read, or holds it in a
    type that does not go together with that of the others. Files without rows may be of any.
    """
    paths = [path for files in splits.values() for path in files]
    if not paths:
        raise DataError(f"{name}: holds no files")
    requests = Requests(name, retry)
    with ThreadPoolExecutor(min(_REQUESTS, len(paths)), thread_name_prefix="hpdist-index") as pool:
        try:
            whole = _whole(paths, columns, requests, pool, folders or Partitions())
        except BaseException:  # also Ctrl-C: a server that is silent must not hold it up
            requests.stop.set()
            raise
    index = _slice(whole, splits, spelled_out(split, splits), name)
    if not index.row_count:
        raise DataError(f"{name}: holds no rows")
    return index


def _whole(
    paths: Sequence[str],
    columns: Sequence[str] | Callable[[pa.Schema], Sequence[str]],
    requests: Requests,
    pool: ThreadPoolExecutor,
    folders: Partitions,
) -> Groups:
    versions = _asked(pool, f"finding the files of {requests.name}", requests.version, paths)
    cache = cache_file(paths, versions, folders)
    kept = load(cache, paths)
    if kept is not None and kept.columns == _chosen(
        columns, pa.ipc.read_schema(pa.py_buffer(kept.schema))
    ):
        return dataclasses.replace(kept, folders=folders)
    schema = folders.added(_first_schema(paths, versions, requests))
    chosen = _chosen(columns, schema)

    def footer(path: str, version: FileVersion) -> Footer:
        return requests.footer(path, version, chosen)

    footers = _asked(pool, f"reading the footers of {requests.name}", footer, paths, versions)
    whole = _join(paths, versions, footers, schema, chosen, requests.name, folders)
    keep(cache, whole)
    return whole


def _asked(
    pool: ThreadPoolExecutor, what: str, function: Callable[..., T], *arguments: Sequence[Any]
) -> list[T]:
    """What a function gives for every file, side by side; shown to be at work."""
    found = []
    with working(what, len(arguments[0]), "files") as work:
        for value in pool.map(function, *arguments):
            found.append(value)
            work.add(1)
    return found


def _first_schema(
    paths: Sequence[str], versions: Sequence[FileVersion], requests: Requests
) -> pa.Schema:
    """The schema of the first file with rows: who writes none may not know their types."""
    for path, version in zip(paths, versions, strict=True):
        _, metadata = requests.metadata(path, version, keep=True)
        if metadata.num_rows:
            return plain_schema(metadata.schema.to_arrow_schema())
    files = f"{len(paths)} files are all" if len(paths) > 1 else "file is"
    raise DataError(f"{requests.name}: holds no rows; its {files} empty")


def _chosen(
    columns: Sequence[str] | Callable[[pa.Schema], Sequence[str]], schema: pa.Schema
) -> tuple[str, ...]:
    return tuple(columns(schema) if callable(columns) else columns)


def _join(
    paths: Sequence[str],
    versions: Sequence[FileVersion],
    footers: Sequence[Footer],
    schema: pa.Schema,
    columns: tuple[str, ...],
    name: str,
    folders: Partitions,
) -> Groups:
    types = _common_types(paths, footers, schema, columns, name, folders)
    for column, kind in types.items():
        at = schema.get_field_index(column)
        schema = schema.set(at, schema.field(at).with_type(kind))
    files = tuple(
        DataFile(path, version, int(footer.rows.sum()), footer.digest)
        for path, version, footer in zip(paths, versions, footers, strict=True)
    )
    counts = [len(footer.rows) for footer in footers]
    rows = np.concatenate([footer.rows for footer in footers])
    number = [np.arange(count) for count in counts]
    return Groups(
        files=files,
        schema=schema.serialize().to_pybytes(),
        columns=columns,
        file=np.repeat(np.arange(len(files)), counts),
        number=np.concatenate(number).astype(np.int64),
        first=np.zeros(len(rows), np.int64),
        rows=rows,
        start=np.cumsum(rows) - rows,
        size=np.concatenate([footer.sizes for footer in footers]),
        stored=np.concatenate([footer.stored for footer in footers]),
        folders=folders,
    )


def _common_types(
    paths: Sequence[str],
    footers: Sequence[Footer],
    schema: pa.Schema,
    columns: Sequence[str],
    name: str,
    folders: Partitions,
) -> dict[str, pa.DataType]:
    """The types of the columns that are read, which hold what every file has of them."""
    types = {column: schema.field(column).type for column in columns}
    first: str | None = None
    for path, footer in zip(paths, footers, strict=True):
        if not footer.rows.any():
            continue
        first = first or path
        named = folders.values.get(path, {})
        found = {
            column: kind if column in footer.types or column not in named else types[column]
            for column, kind in ((column, footer.types.get(column)) for column in columns)
        }
        both = {c: wider(types[c], kind) if kind is not None else None for c, kind in found.items()}
        wrong = {c: found[c] for c, kind in both.items() if kind is None}
        if wrong:
            raise DataError(
                f"{name}: {redacted(path)} has other columns than {redacted(first)}: "
                f"{_differing(wrong, types)}; write all files with the same columns and types, or "
                "leave the file out of data_files"
            )
        types |= {column: kind for column, kind in both.items() if kind is not None}
    return types


def _differing(found: Mapping[str, pa.DataType | None], expected: Mapping[str, pa.DataType]) -> str:
    return ", ".join(
        f"{column!r} is missing"
        if kind is None
        else f"{column!r} is {kind}, not {expected[column]}"
        for column, kind in found.items()
    )


def _slice(whole: Groups, splits: Mapping[str, Sequence[str]], split: str, name: str) -> Index:
    """Keep the rows that a split specification names; their ids stay."""
    lengths: dict[str, int] = {}
    starts: dict[str, int] = {}
    at = 0  # files are laid out split by split
    for key, paths in splits.items():
        count = sum(file.rows for file in whole.files[at : at + len(paths)])
        starts[key], lengths[key] = sum(lengths.values()), count
        at += len(paths)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{name}: the split {split!r} cannot be read: {error}") from error
    pieces = []
    for part in parts:
        low = starts[part.splitname] + (part.from_ or 0)
        length = lengths[part.splitname]
        high = starts[part.splitname] + (length if part.to is None else part.to)
        begin = np.clip(low - whole.start, 0, whole.rows)
        end = np.clip(high - whole.start, 0, whole.rows)
        kept = np.flatnonzero(begin < end)
        pieces.append(
            dataclasses.replace(
                whole,
                file=whole.file[kept],
                number=whole.number[kept],
                first=begin[kept],
                rows=(end - begin)[kept],
                start=(whole.start + begin)[kept],
                size=whole.size[kept],
                stored=whole.stored[kept],
            )
        )
    joined: dict[str, Any] = {
        key: np.concatenate([getattr(piece, key) for piece in pieces]) for key in GROUP_ARRAYS
    }
    if (np.diff(joined["start"]) < joined["rows"][:-1]).any():
        raise DataError(f"{name}: the parts of the split {split!r} overlap or are out of order")
    return _compact(dataclasses.replace(whole, **joined))


def _compact(groups: Groups) -> Index:
    """Keep of each row group its rows alone, and of all others what follows from fewer numbers."""
    rows, size, stored = groups.rows, groups.size, groups.stored
    narrow = not len(rows) or int(rows.max()) < 1 << 32
    swollen = np.flatnonzero(size > np.maximum(claims.LEAST, claims.FACTOR * stored)).tolist()
    return Index(
        files=groups.files,
        schema=groups.schema,
        columns=groups.columns,
        rows=rows.astype(np.uint32 if narrow else np.int64),
        parts=Parts.of(groups.file, groups.number, groups.first, rows, groups.start),
        group_bytes=float(np.average(size, weights=rows)) if rows.any() else 0.0,
        bytes=int(size.sum()),
        swollen=tuple((group, int(size[group]), int(stored[group])) for group in swollen),
        folders=groups.folders,
    )
