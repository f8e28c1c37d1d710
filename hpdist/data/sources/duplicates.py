"""Held-out rows that are training rows too: their inputs compared byte by byte, through a hash.

    report = find_duplicates(config.data.duplicates, held, pools)
    for line in report.lines: print(line)

What is compared is what is stored: an image's encoded bytes, a text's UTF-8, the numbers of a
vector or of several columns. A picture that was saved anew is another one. Of the held-out rows 25
bytes each are kept in memory, and twice as many while they are sorted; the training rows only pass
by, and no file is read whole that is larger than a row may be.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from hpdist.data.config import Duplicates
from hpdist.data.decode.encoded import Array, Unreadable
from hpdist.data.decode.stored_values import Column, stored_inputs
from hpdist.data.files.named_files import NamedFile, named
from hpdist.data.files.open import is_remote
from hpdist.data.files.row_names import describe_row, describe_rows
from hpdist.data.sources.labeled import LabeledRows, UnlabeledTable
from hpdist.data.sources.parquet_table import ParquetTable
from hpdist.data.sources.unlabeled_rows import (
    AnyUnlabeled,
    MixedRows,
    ParquetRows,
    SequentialRows,
    row_count,
)
from hpdist.data.stream.reader import Rows
from hpdist.errors import DataError, one_line
from hpdist.messages.progress import working

_AT_ONCE = 1024  # rows
_DIGEST = np.dtype("S16")
_NAMED = 3  # pairs of rows that a line names
_WAY_OUT = "data.duplicates.check: always compares it"


@dataclass(frozen=True)
class Report:
    """What was compared, and what was found."""

    lines: list[str] = field(default_factory=list)
    """For a person: one for each held-out set."""
    summary: dict[str, Any] = field(default_factory=dict)
    """For `summary.json`: `test/duplicates_in_unlabeled`, …, of what was compared."""
    check: str = "auto"
    """What was asked for."""

    @staticmethod
    def fits(found: Any) -> bool:
        """Whether JSON is what `to_json` gives."""
        kinds = {"lines": list, "summary": dict, "check": str}
        return (
            isinstance(found, dict)
            and found.keys() == kinds.keys()
            and all(isinstance(found[key], kind) for key, kind in kinds.items())
            and all(isinstance(line, str) for line in found["lines"])
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, which `Report(**…)` takes back."""
        return asdict(self)


@dataclass(frozen=True)
class _Digests:
    """The rows of a held-out set by what they hold."""

    digest: Array  # bytes of 16 [rows], sorted
    row: Array  # int64 [rows]

    @staticmethod
    def of(hashed: Iterable[tuple[bytes, int]]) -> _Digests:
        """Take them from pairs of hash and row."""
        digests, rows = bytearray(), array("q")
        for digest, row in hashed:
            digests += digest
            rows.append(row)
        unsorted = np.frombuffer(digests, _DIGEST)
        order = np.argsort(unsorted, kind="stable")  # of equal ones the first row comes first
        return _Digests(unsorted[order], np.frombuffer(rows, np.int64)[order])

    def __len__(self) -> int:
        return len(self.row)


class _Found:
    """Rows of a held-out set that are in one of the sets to train on."""

    def __init__(self, known: _Digests) -> None:
        self._known = known
        self._found = np.zeros(len(known), bool)
        self.pairs: list[tuple[str, str]] = []

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._found.sum())

    def look(self, digests: Array) -> list[tuple[int, int]]:
        """Look for rows; return some to be named, each a line of these and its held-out row."""
        new: list[tuple[int, int]] = []
        first = np.searchsorted(self._known.digest, digests, "left")
        last = np.searchsorted(self._known.digest, digests, "right")
        for line in np.flatnonzero(first < last).tolist():
            same = slice(first[line], last[line])
            if len(self.pairs) + len(new) < _NAMED and not self._found[same].all():
                new.append((line, int(self._known.row[same][0])))
            self._found[same] = True
        return new


class _UncomparedError(Exception):
    """A set is not one that `auto` compares, and why."""


def find_duplicates(
    config: Duplicates,
    held: Mapping[str, LabeledRows],
    pools: Mapping[str, LabeledRows | AnyUnlabeled],
) -> Report:
    """Compare held-out sets, such as `test`, with the sets to train on, such as `unlabeled`.

    One process does it for all. A row that cannot be read is equal to none. Raises DataError where
    a table cannot be read.
    """
    if config.check == "never":
        return Report(["duplicates: not looked for (data.duplicates.check: never)"], check="never")
    if not held:
        lines = ["duplicates: not looked for, there is no test or validation set"]
        return Report(lines, check=config.check)
    report = Report(check=config.check)
    hashed = {name: _digests(config, rows) for name, rows in held.items()}
    known = {name: own for name, own in hashed.items() if not isinstance(own, _UncomparedError)}
    found = {name: _search(config, rows, known, held) for name, rows in pools.items() if known}
    for name, own in hashed.items():
        if isinstance(own, _UncomparedError):
            report.lines.append(f"duplicates: {_left_out(name, own, report)}")
            continue
        phrases = [_phrase(name, pool, result, report) for pool, result in found.items()]
        report.lines.append(f"duplicates: of {len(own)} rows of data.{name} {', '.join(phrases)}")
    return report


def _left_out(name: str, reason: _UncomparedError, report: Report) -> str:
    """What was not compared and why, for a line; the summary takes it too, once."""
    line = f"data.{name} was not compared: it {reason}"
    kept = report.summary.setdefault("duplicates_not_compared", [])
    if line not in kept:
        kept.append(line)
    return line


def _phrase(
    name: str, pool: str, result: Mapping[str, _Found] | _UncomparedError, report: Report
) -> str:
    """What came of one pair of sets, for the line; the summary takes it too."""
    if isinstance(result, _UncomparedError):
        return _left_out(pool, result, report)
    found = result[name]
    report.summary[f"{name}/duplicates_in_{pool}"] = found.count
    if not found.count:
        return f"none are in data.{pool}"
    pairs = "; ".join(f"{row} is {place}" for row, place in found.pairs)
    more = "; …" if found.count > len(found.pairs) else ""
    return f"{found.count} are in data.{pool} ({pairs}{more})"


def _search(
    config: Duplicates,
    pool: LabeledRows | AnyUnlabeled,
    known: Mapping[str, _Digests],
    held: Mapping[str, LabeledRows],
) -> dict[str, _Found] | _UncomparedError:
    """Go through the rows of a set to train on, given what those of the held-out sets hold."""
    found = {name: _Found(digests) for name, digests in known.items()}
    parts = pool.parts if isinstance(pool, MixedRows) else (pool,)
    try:
        limits = [_limit(config, part) for part in parts]
        for part, limit in zip(parts, limits, strict=True):
            several = f"{part.name}, " if len(parts) > 1 else ""
            hashed = _hashed(part, limit)
            while some := list(islice(hashed, _AT_ONCE)):
                digests = np.frombuffer(b"".join(digest for digest, _ in some), _DIGEST)
                for name, result in found.items():
                    for line, row in result.look(digests):
                        place = several + _place(part, some[line][1])
                        result.pairs.append((_place(held[name], row), place))
    except _UncomparedError as reason:
        return reason
    return found


def _digests(config: Duplicates, rows: LabeledRows) -> _Digests | _UncomparedError:
    """The rows of a held-out set by what they hold."""
    try:
        return _Digests.of(_hashed(rows, _limit(config, rows)))
    except _UncomparedError as reason:
        return reason


def _limit(config: Duplicates, rows: Any) -> int | None:
    """How many bytes of a set may be read; raises _UncomparedError where it has more."""
    if config.check == "always":
        return None
    if isinstance(rows, SequentialRows):
        raise _UncomparedError(f"does not say how large it is; {_WAY_OUT}")
    if isinstance(rows, ParquetRows):
        size = rows.index.bytes
        if any(is_remote(file.path) for file in rows.index.files):
            raise _UncomparedError(f"is streamed from elsewhere; {_WAY_OUT}")
    else:
        stored = rows.dataset
        size = int(stored.nbytes if isinstance(stored, ParquetTable) else stored.data.nbytes)
    if size > config.most_bytes:
        raise _too_large(config.most_bytes)
    return config.most_bytes


def _too_large(limit: int) -> _UncomparedError:
    return _UncomparedError(
        f"holds more than {limit} bytes (data.duplicates.most_bytes); {_WAY_OUT}"
    )


def _hashed(rows: Any, limit: int | None) -> Iterator[tuple[bytes, int]]:
    """The hash and the id of every row that can be read, once."""
    read = 0
    for values, ids in _counted(rows):
        for value, row in zip(values, ids, strict=True):
            in_file = isinstance(value, NamedFile)
            data = _file(value) if in_file else _bytes(value)
            if data is None:
                continue
            read += len(data) if in_file else 0  # which the set's own size does not hold
            if limit is not None and read > limit:
                raise _too_large(limit)
            yield xxhash.xxh3_128_digest(data), row


def _counted(rows: Any) -> Iterator[tuple[list[Any], list[int]]]:
    """The stored values of all rows, shown to be at work."""
    total = len(rows) if isinstance(rows, (LabeledRows, UnlabeledTable)) else row_count(rows)
    with working(f"looking for duplicates in {rows.name}", total, "rows") as work:
        for values, ids in _stored(rows):
            yield values, ids
            work.add(len(ids))


def _stored(rows: Any) -> Iterator[tuple[list[Any], list[int]]]:
    """The stored values of all rows that are used, with their ids."""
    if isinstance(rows, (LabeledRows, UnlabeledTable)):
        yield from _of_table(rows)
        return
    order = {"kind": "parquet", "lanes": 1, "groups_per_window": 1}
    reader = rows.reader(0, _AT_ONCE, order=order)
    at = 0
    try:
        while reader.rows is None or at < reader.rows:
            read = reader.read(at, _AT_ONCE, 0, _AT_ONCE)
            at += _AT_ONCE
            first = (read.epochs == 0) & ~np.isin(np.arange(len(read)), list(read.unread))
            yield _picked(rows, read, first)
    finally:
        reader.close()


def _of_table(rows: LabeledRows | UnlabeledTable) -> Iterator[tuple[list[Any], list[int]]]:
    for at in range(0, len(rows), _AT_ONCE):
        ids = rows.ids[at : at + _AT_ONCE]
        first, last = int(ids[0]), int(ids[-1])
        together = last - first + 1 == len(ids)  # a slice is read many times as fast
        try:
            table = rows.dataset[slice(first, last + 1) if together else ids.tolist()]
        except Exception as error:
            raise DataError(
                f"{rows.name}: cannot read {describe_rows(rows.dataset, ids.tolist())}: "
                f"{one_line(error)}"
            ) from error
        read = Rows(table, ids, np.zeros_like(ids))
        yield _picked(rows, read, np.ones(len(ids), bool))


def _picked(rows: Any, read: Rows, wanted: Any) -> tuple[list[Any], list[int]]:
    """The stored values of wanted rows that no filter leaves out."""
    column: Column = rows.column
    functions = getattr(rows, "functions", None)
    if functions is not None and functions.keep is not None:
        wanted = wanted & ~np.isin(np.arange(len(read)), list(rows.values(read).left_out))
    rule = rows.rule if functions is None else functions.rule
    values = named(stored_inputs(read.table, column), rule)
    lines = np.flatnonzero(wanted).tolist()
    return [values[line] for line in lines], read.ids[lines].tolist()


def _bytes(value: Any) -> bytes | None:
    """What a row holds; None where that cannot be read."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or isinstance(value, Unreadable):
        return None
    if isinstance(value, np.ndarray) and value.dtype == object:  # of several columns, texts too
        return repr(value.tolist()).encode()
    if isinstance(value, np.ndarray):  # numbers are equal whatever type they are stored in
        return repr(value.shape).encode() + np.ascontiguousarray(value, np.float64).tobytes()
    return value.encode() if isinstance(value, str) else bytes(value)


def _file(file: NamedFile) -> bytes | None:
    """What the file of a row holds; None where it cannot or may not be read."""
    try:
        return file.read()
    except Exception:  # every transport has its own; who decodes the row says what is wrong
        return None


def _place(rows: Any, row: int) -> str:
    if isinstance(rows, ParquetRows):
        return str(rows.index.describe(row))
    if isinstance(rows, SequentialRows):
        return rows.files.describe(row)
    return describe_row(rows.dataset, row)
