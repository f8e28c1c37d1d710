"""Files of stored pseudo-labels: found, checked against the rows, and read in pieces.

A folder holds Parquet files with a column `id` and `label`, `probabilities` or both: what
`hpdist predict` writes, or any other program. `confidence` is used where there are no
probabilities; `file`, `row_group` and `row` say which row an id was, and must still be true.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.sources.labeled import UnlabeledTable
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled, ParquetRows
from hpdist.data.stream.index import are_records
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError, one_line, printable

RECORD = "_predictions.json"
"""What `hpdist predict` writes down of a folder beside its parts."""
PRIVACY = "_privacy.json"
"""What `hpdist vote` writes where the teachers' labels have no such record."""
METADATA = b"hpdist"
"""The key of what a part says of itself: JSON with the `names` of the classes."""
WHERE = "data.unlabeled.pseudo_labels"

_BATCH = 65_536  # rows that are held at once
_PLACE = ("file", "row_group", "row")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Some rows of a file of labels."""

    ids: Int64Array  # [rows]
    labels: Int64Array  # [rows], class numbers; -1 where a row has no label
    confidence: FloatArray  # [rows]; 1 where the file has none
    probabilities: FloatArray | None  # [rows, classes], in the order of the run's classes


@dataclass(frozen=True)
class LabelFolder:
    """One model's labels: the Parquet files of a folder, in the order of their names.

    Raises DataError, which names file and row, wherever they are not labels of these rows.
    """

    path: Path
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    """Those of `id`, `label`, `confidence`, `probabilities` and the place that all files have."""

    @property
    def soft(self) -> bool:
        """Whether every file has the probabilities of all classes."""
        return "probabilities" in self.columns

    @property
    def content(self) -> list[list[Any]]:
        """Names, sizes and digests of the footers of all files, as JSON."""
        return [[file.name, file.stat().st_size, _footer_digest(file)] for file in self.files]

    def read(self, rows: AnyUnlabeled, names: Sequence[str]) -> Iterator[Piece]:
        """Read everything, checked: ids, places and classes are those of `rows` and `names`."""
        for file in self.files:
            with _readable(file), pq.ParquetFile(file) as opened:
                order = _class_order(file, opened.schema_arrow, names) if self.soft else None
                for batch in opened.iter_batches(_BATCH, columns=list(self.columns)):
                    yield self._piece(file, batch, rows, names, order)

    def _piece(
        self,
        file: Path,
        batch: pa.RecordBatch,
        rows: AnyUnlabeled,
        names: Sequence[str],
        order: Int64Array | None,
    ) -> Piece:
        if batch.column("id").null_count or not pa.types.is_integer(batch.column("id").type):
            raise DataError(f"{WHERE}: {file}: the column id must hold a whole number in each row")
        ids = batch.column("id").to_numpy(zero_copy_only=False).astype(np.int64)
        _check_ids(file, ids, rows)
        if isinstance(rows, ParquetRows) and set(_PLACE) <= set(self.columns):
            _check_places(file, ids, batch, rows)
        labels = np.full(len(ids), -1, np.int64)
        confidence = np.ones(len(ids), np.float32)
        probabilities = None
        if order is not None:
            probabilities, there = _probabilities(file, batch.column("probabilities"), ids, order)
            labels[there] = probabilities[there].argmax(axis=1)
            confidence = probabilities.max(axis=1)
        else:
            labels = _labels(file, batch.column("label"), names)
            if "confidence" in self.columns:
                found = batch.column("confidence").cast(pa.float32())
                confidence = pc.fill_null(found, 0.0).to_numpy(zero_copy_only=False)
                _check_numbers(file, confidence[:, None], ids, "confidence")
        return Piece(ids, labels, confidence, probabilities)


def find_labels(folder: str, rows: AnyUnlabeled, name: str) -> LabelFolder:
    """Find the files of a folder of labels, or take the one file that is named.

    Raises DataError where there are none, where columns are missing, or where `hpdist predict` has
    not finished it, or has written it for rows that have changed since.
    """
    path = Path(folder)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        what = "holds no Parquet files" if path.is_dir() else "is no folder on this machine"
        raise DataError(f"{WHERE}: {folder} {what}; name folders that `hpdist predict` wrote")
    if path.is_dir():
        _check_record(path, files, rows, name)
    columns: set[str] | None = None
    for file in files:
        with _readable(file):
            found = set(pq.read_schema(file).names)
        if "id" not in found or not found & {"label", "probabilities"}:
            raise DataError(
                f"{WHERE}: {file} has the columns {printable(', '.join(sorted(found)), 200)}; it "
                "needs id, and label or probabilities"
            )
        columns = found if columns is None else columns & found
    assert columns is not None
    if not columns & {"label", "probabilities"}:
        raise DataError(f"{WHERE}: the files in {folder} have no column of labels in common")
    known = ("id", "label", "confidence", "probabilities", *_PLACE)
    unused = {"label", "confidence"} if "probabilities" in columns else set()
    kept = tuple(column for column in known if column in columns - unused)
    return LabelFolder(path, tuple(files), kept)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raise DataError where a file is no Parquet or is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{WHERE}: cannot read {file}: {one_line(error)}") from error


def _check_record(folder: Path, files: Sequence[Path], rows: AnyUnlabeled, name: str) -> None:
    """Check what `hpdist predict` recorded of the folder, if it did."""
    if not (folder / RECORD).is_file():
        return
    try:
        record: Mapping[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts, recorded = int(record["parts"]), record["files"]
        expected = int(record["rows"])
        if not are_records([recorded]):
            raise ValueError("its files are not those that hpdist records")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{WHERE}: cannot read {folder / RECORD}: {one_line(error)}") from error
    if len(files) < parts:
        raise DataError(
            f"{WHERE}: {folder} is not finished, {len(files)} of {parts} parts are there; start "
            "that `hpdist predict` again, and it goes on"
        )
    if isinstance(rows, ParquetRows) and recorded and rows.index.record() != recorded:
        sizes = [entry[1:] for entry in recorded], [entry[1:] for entry in rows.index.record()]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{WHERE}: the labels in {folder} are of other data than {name} holds now: "
                f"{rows.index.changes(recorded)}; predict again"
            )
    elif whole_count(rows) != expected:
        raise DataError(
            f"{WHERE}: the labels in {folder} are of {expected:,} rows, and {name} has "
            f"{whole_count(rows):,}; predict again"
        )


def whole_count(rows: AnyUnlabeled) -> int:
    """Count the rows of the whole split that ids number, used or not.

    Raises DataError for rows whose ids are not those of one split.
    """
    if isinstance(rows, ParquetRows):
        return sum(file.rows for file in rows.index.files)
    if isinstance(rows, UnlabeledTable):
        return len(rows.dataset)
    raise DataError(
        f"{WHERE}: {rows.name} is {_KINDS.get(type(rows).__name__, 'no such dataset')}; stored "
        "labels go by the ids of one dataset that is Parquet or a table: `hpdist convert` writes it"
    )


_KINDS = {
    "MixedRows": "mixed of several datasets",
    "SequentialRows": "a stream that does not know its number of rows",
}


def _check_ids(file: Path, ids: Int64Array, rows: AnyUnlabeled) -> None:
    count = whole_count(rows)
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise DataError(
            f"{WHERE}: {file}: id {wrong[0]} is of no row of {rows.name}, whose ids are 0 to "
            f"{count - 1}: these are labels of other data; predict for this split"
        )


def _check_places(file: Path, ids: Int64Array, batch: pa.RecordBatch, rows: ParquetRows) -> None:
    """Check that each id is still the row of the file that it was."""
    index = rows.index
    group = np.searchsorted(index.start, ids, side="right") - 1
    at = ids - index.start[group]
    used = (group >= 0) & (at < index.rows[group])  # the others are outside the split's slice
    names = np.asarray([os.path.basename(entry[0]) for entry in index.record()], dtype=object)
    paths = [str(path) for path in batch.column("file").to_pylist()]
    stored = np.asarray([os.path.basename(path) for path in paths], dtype=object)
    number, line = (
        pc.fill_null(batch.column(column), -1).to_numpy(zero_copy_only=False)
        for column in ("row_group", "row")
    )
    right = (
        (names[index.file[group]] == stored)
        & (index.number[group] == number)
        & (index.first[group] + at == line)
    )
    wrong = np.flatnonzero(used & ~right)
    if len(wrong):
        one = int(wrong[0])
        raise DataError(
            f"{WHERE}: {file}: id {ids[one]} was {paths[one]}, row group {number[one]}, row "
            f"{line[one]}, when it was labelled, and is {index.describe(int(ids[one]))} now; the "
            "data have changed: predict again"
        )


def _class_order(file: Path, schema: pa.Schema, names: Sequence[str]) -> Int64Array:
    """Say where the run's classes stand in the file's probabilities, [classes]."""
    written = (schema.metadata or {}).get(METADATA)
    own = list(names) if written is None else list(json.loads(written).get("names") or names)
    foreign = sorted(set(own) ^ set(names))
    if foreign:
        raise DataError(
            f"{WHERE}: {file}: its classes and the run's are not the same: "
            f"{printable(', '.join(map(repr, foreign[:3])), 200)} stands on one side only"
        )
    return np.asarray([own.index(name) for name in names], np.int64)


def _probabilities(
    file: Path, column: Any, ids: Int64Array, order: Int64Array
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Read a column of lists, [rows, classes], all 0 where a row has none; and which have."""
    there = ~column.is_null().to_numpy(zero_copy_only=False)
    present = column.drop_null()
    lengths = pc.list_value_length(present).to_numpy(zero_copy_only=False)
    if (lengths != len(order)).any():
        wrong = int(np.flatnonzero(lengths != len(order))[0])
        raise DataError(
            f"{WHERE}: {file}: id {ids[there][wrong]} has {lengths[wrong]} probabilities, and the "
            f"run has {len(order)} classes"
        )
    found = np.zeros((len(ids), len(order)), np.float32)
    values = pc.list_flatten(present).to_numpy(zero_copy_only=False).astype(np.float32)
    found[there] = values.reshape(-1, len(order))[:, order]
    _check_numbers(file, found, ids, "probabilities")
    sums = found.sum(axis=1)
    wrong_sums = np.flatnonzero(there & (np.abs(sums - 1) > 0.02))
    if len(wrong_sums):
        one = int(wrong_sums[0])
        raise DataError(
            f"{WHERE}: {file}: the probabilities of id {ids[one]} add up to {sums[one]:.4g}, not 1"
        )
    return found, there


def _check_numbers(file: Path, values: FloatArray, ids: Int64Array, what: str) -> None:
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1.001)).all(axis=1))
    if len(wrong):
        raise DataError(f"{WHERE}: {file}: {what} of id {ids[wrong[0]]} is not within 0 and 1")


def _labels(file: Path, column: Any, names: Sequence[str]) -> Int64Array:
    """Read labels that are names or numbers of classes, int64 [rows]; -1 for null."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for value in encoded.dictionary.to_pylist():
        number = numbers.get(str(value))
        if number is None and isinstance(value, int) and 0 <= value < len(names):
            number = value
        if number is None:
            raise DataError(
                f"{WHERE}: {file}: the label {printable(repr(value), 80)} is none of the run's "
                f"classes {printable(', '.join(list(names)[:5]), 200)}"
            )
        found.append(number)
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    labels: Int64Array = np.asarray([*found, -1], np.int64)[codes]
    return labels


def _footer_digest(file: Path) -> str:
    """Give the SHA-256 of the file's last part, where the footer is."""
    with file.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        size = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - size, os.SEEK_END)
        return hashlib.sha256(opened.read(size)).hexdigest()[:32]
