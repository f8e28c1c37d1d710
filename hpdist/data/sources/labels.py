"""Labels: which column holds them, which rows have one, and which labelled rows are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from hpdist.data.config import Labeled, LongTail
from hpdist.data.decode.written import is_mark, is_minus_one, shortened
from hpdist.data.files.row_names import describe_row
from hpdist.data.kinds.columns import known_column
from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels, plain_labels
from hpdist.data.sources.coded import CodedValues
from hpdist.data.sources.loading import read_column
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

_CHOICE = 0xC401CE  # keeps the draw of labels apart from everything else the seed feeds
ROUNDING = 1e-6  # of a row: a power that should be whole may come out a little less

LISTS = (datasets.List, datasets.LargeList)
"""The types of columns of lists."""

Float64Array = npt.NDArray[np.float64]

_NUMBERS = ("int", "uint", "float", "double", "bool", "decimal")


def label_column(features: Any, column: str | None, where: str) -> str:
    """Find the column of labels: as named, else the only ClassLabel, else one of a usual name."""
    if column is not None:
        return known_column(features, column, f"{where}.label")
    typed: list[str] = [key for key in features if isinstance(features[key], datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    for usual in ("label", "labels", "objects"):
        if usual in features:
            return usual
    raise DataError(f"{where}.label: name the column of labels; there are {', '.join(features)}")


def read_labels(
    table: Any,
    column: str,
    where: str,
    name: str,
    once: Callable[[Callable[[], Any]], Any] = lambda read: read(),
) -> StoredLabels:
    """Read a set's column of labels; raises DataError where its files cannot be read.

    `once` calls what reads it: on one rank alone, where it hands the result to the others.
    """
    feature = table.features[column]
    feature, values = once(lambda: plain_labels(feature, read_column(table, column, name)))
    return StoredLabels(feature, values, where, name, column, partial(describe_row, table))


def check_labels(
    labels: Int64Array, stored: StoredLabels, classes: Classes, rows: Sequence[int] | Int64Array
) -> None:
    """Raise DataError for the first of `rows` that has no class."""
    used = np.asarray(rows, np.int64)
    wrong: list[int] = used[labels[used] < 0].tolist()
    if wrong:
        more = f"; it is the first of {len(wrong)} such rows" if len(wrong) > 1 else ""
        reason = f", which is none of the {len(classes)} classes ({classes.shown}){more}"
        raise DataError(stored.refusal(wrong[0], reason))


def with_labels(stored: StoredLabels, unlabeled: BoolArray) -> tuple[Int64Array, list[str]]:
    """Give the rows that have a label, int64 [rows], and say how many have none.

    Raises DataError where no row has one.
    """
    rows = np.flatnonzero(~unlabeled)
    count = len(unlabeled)
    if len(rows) == count:
        return rows, []
    first = int(unlabeled.argmax())
    marks = marks_of(stored, unlabeled)
    if not len(rows):
        raise DataError(
            f"{stored.name}: no row has a label in column {stored.column!r}: all {count} are "
            f"marked as unlabelled ({marks}); name the column of labels in "
            f"{stored.where}.label, or label some rows"
        )
    written = any(isinstance(stored.values[row], (str, bytes)) for row in rows[:1].tolist())
    way = "give it a name" if written else "write the labels as text"
    class_way = f"; where -1 is a class, {way}" if "-1" in marks.split(", ") else ""
    return rows, [
        f"{stored.where}: {len(rows)} of {count} rows have a label in column {stored.column!r}; "
        f"the others ({marks}; the first is {stored.describe(first)}) are passed "
        f"over as unlabelled{class_way}"
    ]


def marks_of(stored: StoredLabels, unlabeled: BoolArray) -> str:
    """Name what marks rows as unlabelled, for messages."""
    if isinstance(stored.values, CodedValues):
        return shortened(list(dict.fromkeys(map(_mark, stored.values.among(unlabeled)))))
    marked = np.flatnonzero(unlabeled).tolist()
    return shortened(list(dict.fromkeys(_mark(stored.values[row]) for row in marked)))


def _mark(value: Any) -> str:
    """What marks a row as unlabelled, for messages."""
    if isinstance(value, list):
        return "-1" if any(map(is_minus_one, value)) else "null"
    if is_minus_one(value):
        return "-1"
    if not is_mark(value):
        return repr(value)
    return "an empty text" if isinstance(value, (str, bytes)) else "null"


def is_blank(value: Any, minus_one: bool = False) -> bool:
    """Whether a row is marked as one without labels: by a mark, or a list of nothing else."""
    if isinstance(value, list):
        return bool(value) and all(is_mark(one, minus_one) for one in value)
    return is_mark(value)


def holds_numbers(feature: Any) -> bool:
    """Whether a column holds numbers, or lists of numbers, and not classes."""
    inner = feature.feature if isinstance(feature, LISTS) else feature
    kind = getattr(inner, "dtype", "")
    return not isinstance(inner, datasets.ClassLabel) and kind.startswith(_NUMBERS)


def describe_missing(
    classes: Classes, counts: npt.NDArray[Any], where: str, training: bool
) -> list[str]:
    """Say which classes have no row, by the rows of each, and which one is alone."""
    found = [] if classes.note is None or not training else [classes.note]
    absent = [name for name, rows in zip(classes.names, counts, strict=True) if not rows]
    if training and len(absent) == len(classes) - 1:
        (only,) = set(classes.names) - set(absent)
        return [*found, f"note: {where} has rows of one class alone, {shortened([only])!r}"]
    if absent:
        of = f"{len(absent)} of the {len(classes)} classes"
        found.append(f"note: {where} has no row of {of}: {shortened(absent)}")
    return found


def check_indices(indices: list[int] | None, rows: int, setting: str) -> None:
    """Raise DataError for row numbers that are out of range or repeated."""
    if indices is None:
        return
    if not indices:
        raise DataError(f"{setting}: names no rows")
    earlier: set[int] = set()
    for index in indices:
        if not 0 <= index < rows:
            raise DataError(
                f"{setting}: {index} is out of range; the split has rows 0 to {rows - 1}"
            )
        if index in earlier:
            raise DataError(f"{setting}: {index} is repeated; name every row once")
        earlier.add(index)


def check_labeled(
    indices: list[int] | None, stored: StoredLabels, unlabeled: BoolArray, setting: str
) -> None:
    """Raise DataError for a row number whose row has no label."""
    for index in indices or ():
        if unlabeled[index]:
            raise DataError(
                stored.refusal(
                    index,
                    f", which marks it as unlabelled, and {setting} names it",
                    "leave it out there, or label it",
                )
            )


def draw_rows(
    config: Labeled,
    stored: StoredLabels,
    numbers: Int64Array | None,
    usable: Int64Array,
    classes: Classes,
    seed: int,
) -> Int64Array:
    """Draw among the `usable` rows from the seed alone, so that every rank draws the same.

    `numbers` are the classes of all rows of the split, int64 [rows], or None where a row is not of
    one class. Raises DataError where there are not enough rows.
    """
    generator, where = np.random.default_rng([seed, _CHOICE]), stored.where
    if config.rows is not None:
        if config.rows > len(usable):
            having = " with a label" if len(usable) < len(stored.values) else ""
            raise DataError(
                f"{where}.rows: {config.rows} asked for, the split has {len(usable)}{having}"
            )
        return generator.choice(usable, config.rows, replace=False)
    if config.labels_per_class is None:
        return usable
    if numbers is None:
        raise DataError(
            f"{where}.labels_per_class: goes by the class of a row, and with these labels a row "
            f"has not one; use {where}.rows or indices"
        )
    shares = np.ones(len(classes)) if config.imbalance is None else tail(config, len(classes))
    sizes = sizes_of(config.labels_per_class, shares)
    return draw_sizes(sizes, numbers, classes, generator, f"{where}.labels_per_class")


def tail(config: LongTail, classes: int) -> Float64Array:
    """Each class's share of the most frequent one's rows: gamma^(-(c - 1) / (C - 1))."""
    assert config.imbalance is not None
    shares: Float64Array = config.imbalance ** -np.linspace(0, 1, classes)
    return shares[::-1] if config.imbalance_reversed else shares


def sizes_of(most: int, shares: Float64Array) -> Int64Array:
    """Rows of every class, rounded down, where the most frequent one has `most`."""
    sizes: Int64Array = np.floor(most * shares + ROUNDING).astype(np.int64)
    return sizes


def draw_sizes(
    sizes: Int64Array,
    labels: Int64Array,
    classes: Classes,
    generator: np.random.Generator,
    setting: str,
) -> Int64Array:
    """Draw so many rows of every class."""
    parts = []
    # Once, as there may be as many classes as rows; numpy sorts short integers by their digits.
    short = labels.astype(np.int16) if len(classes) <= np.iinfo(np.int16).max else labels
    order = np.argsort(short, kind="stable")
    counts = np.bincount(labels + 1, minlength=len(classes) + 1)  # first those without a class
    ends = counts.cumsum()
    pairs = zip(classes.names, sizes.tolist(), strict=True)
    for number, (class_name, wanted) in enumerate(pairs):
        of_class = order[ends[number] : ends[number + 1]]
        if len(of_class) < wanted:
            raise DataError(
                f"{setting}: {wanted} asked for, class {class_name!r} has {len(of_class)}"
            )
        parts.append(generator.choice(of_class, wanted, replace=False))
    return np.concatenate(parts)
