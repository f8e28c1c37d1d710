"""Where every row of a Parquet dataset lies: the row groups of its files.

A row's id is its number in the split, in the order of the files, which never changes as long as the
files do not. A row group costs 4 bytes, its number of rows: all else follows from where each file
begins, and from sums over every 256 row groups.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.files.open import FileVersion, redacted
from hpdist.data.files.partitions import Partitions
from hpdist.data.stream import claims
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

Counts: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Numbers of rows, of 32 bits where these hold them all, and perhaps in a mapped file."""

_NAMED_CHANGES = 3
_SPAN = 256  # row groups between two sums that are kept
_HASHED = 1 << 20  # row groups that are hashed at a time


@dataclass(frozen=True)
class DataFile:
    """One Parquet file as it was found."""

    path: str
    version: FileVersion
    rows: int
    digest: str
    """SHA-256 of its footer, which names the place of every page."""


@dataclass(frozen=True)
class Parts:
    """Row groups that follow one another in a file, with ids that do: mostly a part for each file.

    All are int64 arrays, [parts]. Only the first row group of a part may have rows at its beginning
    that are not used, and only the last one at its end.
    """

    at: Int64Array
    """The first row group, in the index."""
    file: Int64Array
    """The file, in `Index.files`."""
    number: Int64Array
    """The number of the first row group in its file."""
    first: Int64Array
    """The first row used of that row group."""
    offset: Int64Array
    """The id of that row less the rows of all row groups before it."""

    @staticmethod
    def of(
        file: Int64Array, number: Int64Array, first: Int64Array, rows: Int64Array, start: Int64Array
    ) -> Parts:
        """Find them from what is known of each row group, [groups]; `start` is the first id."""
        begins = np.ones(len(rows), bool)
        begins[1:] = (np.diff(file) != 0) | (np.diff(number) != 1) | (first[1:] != 0)
        begins[1:] |= start[1:] != start[:-1] + rows[:-1]
        at = np.flatnonzero(begins)
        before = (np.cumsum(rows) - rows)[at]
        return Parts(at, file[at], number[at], first[at], start[at] - before)


@dataclass(frozen=True)
class Index:
    """The row groups of a split, in file order; of a sliced split only what the slice holds."""

    files: tuple[DataFile, ...]
    schema: bytes
    """The Arrow schema of the first file with rows, serialised; what is read is of types that hold
    what all files have."""
    columns: tuple[str, ...]
    """Those that are read."""
    rows: Counts  # [groups], rows used
    parts: Parts
    group_bytes: float
    """Bytes of a row group in memory, weighted by its rows: what a row's group costs."""
    bytes: int
    """Bytes of all row groups in memory."""
    swollen: tuple[tuple[int, int, int], ...] = ()
    """Row groups that take far more in memory than in the file: which, and both in bytes."""
    folders: Partitions = dataclasses.field(default_factory=Partitions)
    """The columns that folders name."""
    known_fingerprint: str | None = None
    """As another process computed it."""

    @property
    def arrow_schema(self) -> pa.Schema:
        """The columns and their types, those that folders name among them."""
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any file's content or place in the order, not with names and dates."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.version.size} {file.digest}\n".encode())
            named = self.folders.values.get(file.path, {})
            for column in self.columns:
                if column in named:
                    digest.update(f"{column}={named[column]}\n".encode())
        for low in range(0, len(self.rows), _HASHED):
            begin, end = np.searchsorted(self.parts.at, [low, low + _HASHED])
            first = np.zeros(min(_HASHED, len(self.rows) - low), np.int64)
            first[self.parts.at[begin:end] - low] = self.parts.first[begin:end]
            digest.update(first.tobytes())
        for low in range(0, len(self.rows), _HASHED):
            digest.update(self.rows[low : low + _HASHED].astype(np.int64).tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def row_count(self) -> int:
        """Rows used, of all row groups."""
        return int(self._before[-1])

    @cached_property
    def id_count(self) -> int:
        """What is more than any id: the ids of rows that a slice leaves out stay free."""
        return self.row_count + int(self.parts.offset[-1])

    def check_sizes(self, budget: int, name: str) -> None:
        """Raise DataError where rows take far more memory than a budget and than their bytes."""
        for group, size, stored in self.swollen:
            most = claims.most_bytes(budget, stored)
            if size > most:
                file, number, _ = self.locate(group)
                raise DataError(
                    f"{name}: {redacted(file.path)}, row group {number}: its footer says that its "
                    f"rows take {size} bytes of memory, of {stored} in the file; the most is "
                    f"{most}; if that is right, raise shuffle_window, else leave the file out of "
                    "data_files"
                )

    def locate(self, group: int) -> tuple[DataFile, int, int]:
        """The file of a group, the group's number there, and the first row used of it."""
        part = self._part(group)
        behind = group - int(self.parts.at[part])
        first = 0 if behind else int(self.parts.first[part])
        return self.files[int(self.parts.file[part])], int(self.parts.number[part]) + behind, first

    def ids(self, group: int, start: int, stop: int) -> Int64Array:
        """The ids of rows [start, stop) of a group's used rows."""
        low = group // _SPAN * _SPAN
        before = int(self._before[group // _SPAN]) + int(self.rows[low:group].sum())
        first = before + int(self.parts.offset[self._part(group)])
        return np.arange(first + start, first + stop)

    def describe(self, row: int) -> str:
        """Name the file, row group and row of an id."""
        parts = self.parts
        part = int(np.searchsorted(self._part_starts, row, side="right")) - 1
        place = row - int(parts.offset[part])
        span = int(np.searchsorted(self._before, place, side="right")) - 1
        ends = np.cumsum(self.rows[span * _SPAN : (span + 1) * _SPAN], dtype=np.int64)
        within = int(np.searchsorted(ends, place - int(self._before[span]), side="right"))
        file, number, first = self.locate(span * _SPAN + within)
        start = int(self.ids(span * _SPAN + within, 0, 1)[0])
        return f"{redacted(file.path)}, row group {number}, row {first + row - start}"

    @cached_property
    def file(self) -> Int64Array:
        """The file of each row group, [groups]. These four are for many rows at a time."""
        return self.parts.file[self._parts]

    @cached_property
    def number(self) -> Int64Array:
        """The number of each row group in its file, [groups]."""
        places = np.arange(len(self.rows)) - self.parts.at[self._parts]
        return self.parts.number[self._parts] + places

    @cached_property
    def first(self) -> Int64Array:
        """The first row used of each row group, [groups]."""
        first = np.zeros(len(self.rows), np.int64)
        first[self.parts.at] = self.parts.first
        return first

    @cached_property
    def start(self) -> Int64Array:
        """The id of the first row used of each row group, [groups]."""
        ends = np.cumsum(self.rows, dtype=np.int64)
        return ends - self.rows + self.parts.offset[self._parts]

    def header(self) -> str:
        """Give all but `rows`, as JSON; `from_header` makes an index of both."""
        facts = {
            "files": [
                [file.path, file.version.size, file.version.tag, file.rows, file.digest]
                for file in self.files
            ],
            "schema": _text(self.schema),
            "columns": self.columns,
            "parts": [getattr(self.parts, f.name).tolist() for f in dataclasses.fields(Parts)],
            "group_bytes": self.group_bytes,
            "bytes": self.bytes,
            "swollen": self.swollen,
            "folders": [_text(self.folders.schema.serialize().to_pybytes()), self.folders.values],
            "fingerprint": self.fingerprint,
        }
        return json.dumps(facts)

    @staticmethod
    def from_header(header: str, rows: Counts) -> Index:
        """Make what another process has of its `header` and its `rows`."""
        facts = json.loads(header)
        schema, values = facts["folders"]
        return Index(
            files=tuple(
                DataFile(path, FileVersion(size, tag), count, digest)
                for path, size, tag, count, digest in facts["files"]
            ),
            schema=base64.b64decode(facts["schema"]),
            columns=tuple(facts["columns"]),
            rows=rows,
            parts=Parts(*(np.asarray(part, np.int64) for part in facts["parts"])),
            group_bytes=facts["group_bytes"],
            bytes=facts["bytes"],
            swollen=tuple((group, size, stored) for group, size, stored in facts["swollen"]),
            folders=Partitions(
                pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema))), dict(values)
            ),
            known_fingerprint=facts["fingerprint"],
        )

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

    def _part(self, group: int) -> int:
        return int(np.searchsorted(self.parts.at, group, side="right")) - 1

    @cached_property
    def _parts(self) -> Int64Array:
        """The part of each row group, [groups]."""
        sizes = np.diff(self.parts.at, append=len(self.rows))
        return np.repeat(np.arange(len(sizes)), sizes)

    @cached_property
    def _part_starts(self) -> Int64Array:
        """The first id of each part, [parts]."""
        spans = self.parts.at // _SPAN
        within = [
            int(self.rows[span * _SPAN : at].sum())
            for span, at in zip(spans.tolist(), self.parts.at.tolist(), strict=True)
        ]
        starts: Int64Array = self._before[spans] + np.asarray(within, np.int64) + self.parts.offset
        return starts

    @cached_property
    def _before(self) -> Int64Array:
        """Rows before every 256th row group, and at last all rows, [groups / 256 + 1]."""
        turns, rest = divmod(len(self.rows), _SPAN)
        sums = self.rows[: turns * _SPAN].reshape(turns, _SPAN).sum(axis=1, dtype=np.int64)
        if rest:
            sums = np.append(sums, self.rows[turns * _SPAN :].sum(dtype=np.int64))
        return np.concatenate([[0], np.cumsum(sums)])


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def are_records(found: Any) -> bool:
    """Whether JSON is a list of what `Index.record` gives, None for what is no Parquet dataset."""
    return isinstance(found, list) and all(
        record is None
        or (isinstance(record, list) and all(isinstance(f, list) and len(f) == 4 for f in record))
        for record in found
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
