"""Where every row of a Parquet dataset lies: the row groups of its files, from their footers.

    files = split_files({"train": ["a.parquet", "b.parquet"]}, "train[:90%]", "data.unlabeled")
    index = build_index(files, "train[:90%]", ["image"], "data.unlabeled (…)", Retry())

Costs one small read per file, side by side, and nothing at the next start: the result is kept on
disk under the files' versions. A row's id is its number in the split, in the order of the files,
which never changes as long as the files do not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError
from hpdist.messages.progress import working

_VERSION = 5  # of the cache's format
T = TypeVar("T")

_REQUESTS = 32  # files that are asked at once
_NAMED_CHANGES = 3
_ARRAYS = ("file", "number", "first", "rows", "start", "size", "stored")


@dataclass(frozen=True)
class DataFile:
    """One Parquet file as it was found."""

    path: str
    version: FileVersion
    rows: int
    digest: str
    """SHA-256 of its footer, which names the place of every page."""


@dataclass(frozen=True)
class Index:
    """The row groups of a split, in file order; of a sliced split only what the slice holds."""

    files: tuple[DataFile, ...]
    schema: bytes
    """The Arrow schema of the first file with rows, serialised; what is read is of types that hold
    what all files have."""
    columns: tuple[str, ...]
    """Those that are read."""
    file: Int64Array  # [groups], index into files
    number: Int64Array  # [groups], in the file
    first: Int64Array  # [groups], the first row used
    rows: Int64Array  # [groups], rows used
    start: Int64Array  # [groups], id of the first row used
    size: Int64Array  # [groups], bytes of the whole row group's columns that are read, in memory
    stored: Int64Array  # [groups], and in the file
    folders: Partitions = dataclasses.field(default_factory=Partitions)
    """The columns that folders name."""

    @property
    def arrow_schema(self) -> pa.Schema:
        """The columns and their types, those that folders name among them."""
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any file's content or place in the order, not with names and dates."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.version.size} {file.digest}\n".encode())
            named = self.folders.values.get(file.path, {})
            for column in self.columns:
                if column in named:
                    digest.update(f"{column}={named[column]}\n".encode())
        digest.update(self.first.tobytes() + self.rows.tobytes())
        return digest.hexdigest()[:32]

    def check_sizes(self, budget: int, name: str) -> None:
        """Raise DataError where rows take far more memory than a budget and than their bytes."""
        most = np.maximum(max(budget, claims.LEAST), claims.FACTOR * self.stored)
        wrong = np.flatnonzero(self.size > most)
        if len(wrong):
            group = int(wrong[0])
            path = redacted(self.files[int(self.file[group])].path)
            raise DataError(
                f"{name}: {path}, row group {int(self.number[group])}: its footer says that its "
                f"rows take {int(self.size[group])} bytes of memory, of {int(self.stored[group])} "
                f"in the file; the most is {int(most[group])}; if that is right, raise "
                "shuffle_window, else leave the file out of data_files"
            )

    def ids(self, group: int, start: int, stop: int) -> Int64Array:
        """The ids of rows [start, stop) of a group's used rows."""
        first = int(self.start[group])
        return np.arange(first + start, first + stop)

    def describe(self, row: int) -> str:
        """Name the file, row group and row of an id."""
        group = int(np.searchsorted(self.start, row, side="right")) - 1
        at = int(self.first[group] + row - self.start[group])
        path = redacted(self.files[int(self.file[group])].path)
        return f"{path}, row group {int(self.number[group])}, row {at}"

    def record(self) -> list[list[Any]]:
        """The files as JSON, to name what changed when a later index differs."""
        return [[redacted(f.path), f.version.size, f.rows, f.digest] for f in self.files]

    def changes(self, recorded: Sequence[Sequence[Any]]) -> str:
        """Name the first differences to an earlier record of the same dataset."""
        before, now = _by_name(recorded, self.record())
        found = [f"{name} is gone" for name in before if name not in now]
        found += [f"{name} is new" for name in now if name not in before]
        for name, (size, rows, digest) in now.items():
            if name in before and before[name] != (size, rows, digest):
                old = before[name]
                found.append(
                    f"{name} was rewritten: {old[1]} rows in {old[0]} bytes, now {rows} in {size}"
                )
        if not found:
            return "its files come in another order, or the split's slice differs"
        more = f" and {len(found) - _NAMED_CHANGES} more" if len(found) > _NAMED_CHANGES else ""
        return ", ".join(found[:_NAMED_CHANGES]) + more


def are_records(found: Any) -> bool:
    """Whether JSON is a list of what `Index.record` gives, None for what is no Parquet dataset."""
    return isinstance(found, list) and all(
        record is None
        or (isinstance(record, list) and all(isinstance(f, list) and len(f) == 4 for f in record))
        for record in found
    )


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
    if not index.rows.sum():
        raise DataError(f"{name}: holds no rows")
    return index


def _whole(
    paths: Sequence[str],
    columns: Sequence[str] | Callable[[pa.Schema], Sequence[str]],
    requests: Requests,
    pool: ThreadPoolExecutor,
    folders: Partitions,
) -> Index:
    versions = _asked(pool, f"finding the files of {requests.name}", requests.version, paths)
    cache = _cache_file(paths, versions, folders)
    kept = _load(cache, paths)
    if kept is not None and kept.columns == _chosen(columns, kept.arrow_schema):
        return dataclasses.replace(kept, folders=folders)
    schema = folders.added(_first_schema(paths, versions, requests))
    chosen = _chosen(columns, schema)

    def footer(path: str, version: FileVersion) -> Footer:
        return requests.footer(path, version, chosen)

    footers = _asked(pool, f"reading the footers of {requests.name}", footer, paths, versions)
    whole = _join(paths, versions, footers, schema, chosen, requests.name, folders)
    _keep(cache, whole)
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
) -> Index:
    types = _common_types(paths, footers, schema, columns, name, folders)
    for column, kind in types.items():
        at = schema.get_field_index(column)
        schema = schema.set(at, schema.field(at).with_type(kind))
    files = tuple(
        DataFile(path, version, sum(footer.rows), footer.digest)
        for path, version, footer in zip(paths, versions, footers, strict=True)
    )
    counts = [len(footer.rows) for footer in footers]
    rows = np.asarray([count for footer in footers for count in footer.rows], np.int64)
    number = [np.arange(count) for count in counts]
    return Index(
        files=files,
        schema=schema.serialize().to_pybytes(),
        columns=columns,
        file=np.repeat(np.arange(len(files)), counts),
        number=np.concatenate(number).astype(np.int64),
        first=np.zeros(len(rows), np.int64),
        rows=rows,
        start=np.cumsum(rows) - rows,
        size=np.asarray([size for footer in footers for size in footer.sizes], np.int64),
        stored=np.asarray([size for footer in footers for size in footer.stored], np.int64),
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
        if not sum(footer.rows):
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


def _by_name(*records: Sequence[Sequence[Any]]) -> list[dict[str, tuple[Any, ...]]]:
    """Files by their names, which stay when a folder moves; by whole paths where names repeat."""
    paths = [[str(path) for path, *_ in record] for record in records]
    short = [[os.path.basename(path) for path in names] for names in paths]
    unique = all(len(set(names)) == len(names) for names in short)
    return [
        {name: tuple(rest) for name, (_, *rest) in zip(names, record, strict=True)}
        for names, record in zip(short if unique else paths, records, strict=True)
    ]


def _slice(whole: Index, splits: Mapping[str, Sequence[str]], split: str, name: str) -> Index:
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
        key: np.concatenate([getattr(piece, key) for piece in pieces]) for key in _ARRAYS
    }
    if (np.diff(joined["start"]) < joined["rows"][:-1]).any():
        raise DataError(f"{name}: the parts of the split {split!r} overlap or are out of order")
    return dataclasses.replace(whole, **joined)


def _cache_file(
    paths: Sequence[str], versions: Sequence[FileVersion], folders: Partitions
) -> Path | None:
    """Where the footers of these versions are kept; nowhere if a version cannot be told."""
    if not all(version.tag or "@" in path for path, version in zip(paths, versions, strict=True)):
        return None
    facts: list[Any] = [_VERSION, pa.__version__]
    facts += [[p, v.size, v.tag] for p, v in zip(paths, versions, strict=True)]
    facts += [[column.name, str(column.type)] for column in folders.schema]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_CACHE_HOME, "hpdist", "index", f"{key}.npz")


def _keep(cache: Path | None, index: Index) -> None:
    """Write the cache; a disk that is full or read-only costs the next start its time only."""
    if cache is None:
        return
    # Not their paths, which may hold a password: whoever asks has them.
    files = [[f.version.size, f.version.tag, f.rows, f.digest] for f in index.files]
    facts = json.dumps([index.columns, files]).encode()
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.savez(
                out,
                facts=np.frombuffer(facts, np.uint8),
                schema=np.frombuffer(index.schema, np.uint8),
                groups=np.stack([getattr(index, key) for key in _ARRAYS]),
            )
        os.replace(temporary, cache)
    except OSError:
        temporary.unlink(missing_ok=True)


def _load(cache: Path | None, paths: Sequence[str]) -> Index | None:
    """What an earlier start kept of these files; None where there is nothing, or not all of it."""
    if cache is None or not cache.exists():
        return None
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            columns, facts = json.loads(kept["facts"].tobytes())
            arrays = dict(zip(_ARRAYS, kept["groups"], strict=True))
            schema = kept["schema"].tobytes()
            files = [
                DataFile(path, FileVersion(size, tag), rows, digest)
                for path, (size, tag, rows, digest) in zip(paths, facts, strict=True)
            ]
        pa.ipc.read_schema(pa.py_buffer(schema))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(array.dtype != np.int64 or array.ndim != 1 for array in arrays.values()):
        return None
    return Index(
        tuple(files),
        schema,
        tuple(columns),
        **arrays,
    )
