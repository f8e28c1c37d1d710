"""Columns of a table that hold no numbers: every category of one becomes a feature of 0 and 1.

    categories = find_categories(table, ("age", "city"), name)
    categories.features  # ("age", "city=Rome", "city=Ulm")
    categories.encode([41.0, "Ulm"])  # [41.0, 0.0, 1.0]

Which categories there are, the training rows say, and the run's folder keeps it. A value that none
of them has, and a missing one, is none of the categories: all its features are 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_column
from hpdist.data.decode.written import is_mark, shortened, spelling
from hpdist.errors import DataError

MOST = 100
"""Categories that a column may have."""

Features: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Categories:
    """What the columns of a table become: of numbers one feature, of others one per category."""

    columns: tuple[str, ...]
    """All columns of the input, those of numbers too."""
    names: tuple[tuple[str, ...] | None, ...]
    """The categories of each column; None where it holds numbers."""
    declared: tuple[str, ...] = ()
    """Columns whose categories a ClassLabel names: what they store is a category's place."""

    @cached_property
    def features(self) -> tuple[str, ...]:
        """The names of the features that a row becomes."""
        pairs = zip(self.columns, self.names, strict=True)
        return tuple(
            name
            for column, own in pairs
            for name in ([column] if own is None else [f"{column}={category}" for category in own])
        )

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Give the column that every feature comes from."""
        sizes = [1 if own is None else len(own) for own in self.names]
        return tuple(number for number, size in enumerate(sizes) for _ in range(size))

    @cached_property
    def _places(self) -> tuple[Mapping[Any, int] | None, ...]:
        """Give, for each column, the place of every value that may stand in it."""
        pairs = zip(self.columns, self.names, strict=True)
        return tuple(None if own is None else self._index(column, own) for column, own in pairs)

    def _index(self, column: str, names: Sequence[str]) -> Mapping[Any, int]:
        found: dict[Any, int] = {name: place for place, name in enumerate(names)}
        return found | dict(enumerate(range(len(names)))) if column in self.declared else found

    def place(self, number: int, value: Any) -> int | None:
        """Give the place of a value among the categories of a column; None where it has none."""
        places = self._places[number]
        if places is None or is_mark(value):
            return None
        found = places.get(value)
        return places.get(spelling(value)) if found is None else found

    def encode(self, row: Sequence[Any]) -> Features:
        """Turn a row's stored values into its features; a missing number is NaN.

        Raises ValueError where a value cannot be used.
        """
        if len(row) != len(self.columns):
            raise ValueError(
                f"it has {len(row)} columns, and the first labelled row has {len(self.columns)}"
            )
        found = np.zeros(len(self.features))
        at = 0
        for number, (value, own) in enumerate(zip(row, self.names, strict=True)):
            reason = getattr(value, "reason", None)
            if reason is not None:
                raise ValueError(f"column {self.columns[number]!r}: {reason}")
            if own is None:
                found[at] = np.nan if value is None else float(value)
            else:
                place = self.place(number, value)
                if place is not None:
                    found[at + place] = 1.0
            at += 1 if own is None else len(own)
        return found

    def check(self, features: Any, columns: Sequence[str], where: str) -> None:
        """Raise DataError where another set's columns do not hold what the labelled set's do."""
        for column, first, own in zip(columns, self.columns, self.names, strict=False):
            feature = features[column]
            if own is None and not is_number(feature):
                raise DataError(
                    f"{where}: column {column!r} holds {held(feature)}, and column {first!r} of "
                    "data.labeled holds numbers; store both alike"
                )
            named = isinstance(feature, datasets.ClassLabel)
            if (
                own is not None
                and named
                and (first not in self.declared or tuple(feature.names) != own)
            ):
                raise DataError(
                    f"{where}: column {column!r} is a ClassLabel of {shortened(feature.names)}, "
                    f"and that of data.labeled has the categories {shortened(own)}; store both "
                    "alike"
                )

    def widened(self, table: Any, columns: Sequence[str], name: str) -> Categories:
        """Add the categories that another set of training rows has. Raises DataError."""
        names = [
            own
            if own is None or first in self.declared
            else _sorted({*own, *_texts(_counted(table, column))}, first, name)
            for first, column, own in zip(self.columns, columns, self.names, strict=True)
        ]
        return replace(self, names=tuple(names))

    def strangers(self, table: Any, columns: Sequence[str], where: str) -> list[str]:
        """Say which columns of a set have values that are none of the categories."""
        lines = []
        for number, (column, own) in enumerate(zip(columns, self.names, strict=True)):
            if own is None:
                continue
            others = {
                value: count
                for value, count in _counted(table, column).items()
                if self.place(number, value) is None
            }
            missing = sum(count for value, count in others.items() if is_mark(value))
            unknown = sorted(str(value) for value in others if not is_mark(value))
            parts = [f"no value in {_rows(missing)}"] if missing else []
            if unknown:
                rows = sum(others.values()) - missing
                parts.append(
                    f"values that no training row has ({shortened(unknown)}) in {_rows(rows)}"
                )
            if parts:
                lines.append(
                    f"note: {where}: column {column!r} has {' and '.join(parts)}: they are none of "
                    "its categories, all 0"
                )
        return lines

    def line(self) -> str:
        """Say what is encoded, for a person."""
        own = [
            f"{column} ({len(names)})"
            for column, names in zip(self.columns, self.names, strict=True)
            if names is not None
        ]
        return (
            f"data.labeled.input: a 0 or 1 for every category of {', '.join(own)}; "
            f"{len(self.features)} features in all"
        )

    def record(self) -> dict[str, Any]:
        """The categories as JSON, for a run that goes on."""
        return {
            "columns": list(self.columns),
            "names": [None if own is None else list(own) for own in self.names],
            "declared": list(self.declared),
        }

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Categories:
        """Take back what `record` gave."""
        names = (None if own is None else tuple(own) for own in values["names"])
        return cls(tuple(values["columns"]), tuple(names), tuple(values["declared"]))


def find_categories(table: Any, columns: Sequence[str], name: str) -> Categories | None:
    """Find the categories of those columns that hold none but numbers; None where all do.

    `table` holds the training rows; `name` is for messages. Raises DataError where a column has too
    many, or none.
    """
    features = table.features
    if all(is_number(features[column]) for column in columns):
        return None
    names: list[tuple[str, ...] | None] = []
    declared = []
    for column in columns:
        feature = features[column]
        if is_number(feature):
            names.append(None)
        elif isinstance(feature, datasets.ClassLabel):
            declared.append(column)
            names.append(tuple(feature.names))
        else:
            names.append(_sorted(_texts(_counted(table, column)), column, name))
    return Categories(tuple(columns), tuple(names), tuple(declared))


def is_number(feature: Any) -> bool:
    """Whether a column holds numbers or booleans."""
    kinds = ("int", "uint", "float", "double", "bool", "decimal")
    dtype = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.Value) and dtype.startswith(kinds)


def is_category(feature: Any) -> bool:
    """Whether a column holds what may be categories: texts, or a ClassLabel."""
    return isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "") in (
        "string",
        "large_string",
        "string_view",
    )


def held(feature: Any) -> str:
    """What a column holds, for messages."""
    if isinstance(feature, datasets.ClassLabel):
        return "a ClassLabel"
    if is_category(feature):
        return "text"
    if is_number(feature):
        return "numbers"
    for kind, name in _NAMES.items():
        if isinstance(feature, kind):
            return name
    dtype = getattr(feature, "dtype", "")
    is_bytes = "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature)
    return "bytes" if is_bytes else dtype or str(feature)


_NAMES: Mapping[Any, str] = {
    datasets.Image: "images",
    datasets.Audio: "sound",
    datasets.List: "lists",
    datasets.LargeList: "lists",
    datasets.Array2D: "arrays",
    datasets.Array3D: "arrays",
}


def _sorted(values: set[str], column: str, name: str) -> tuple[str, ...]:
    found = tuple(sorted(values))
    if len(found) > MOST:
        raise DataError(
            f"{name}: column {column!r} has {len(found)} different texts ({shortened(found)}), and "
            f"no more than {MOST} become categories; leave it out of data.labeled.input, or write "
            "it as numbers"
        )
    if not found:
        raise DataError(f"{name}: column {column!r} has no value in any row; leave it out")
    return found


def _texts(counted: Mapping[Any, int]) -> set[str]:
    """The categories among values, as they are written."""
    return {str(spelling(value) or value) for value in counted if not is_mark(value)}


def _counted(table: Any, column: str) -> Counter[Any]:
    """How many rows have each value of a column. Raises DataError where it cannot be read."""
    try:
        stored = table.select_columns([column]).with_format("arrow")[:].column(column)
        values, counts = pc.value_counts(plain_column(stored)).flatten()
        return Counter(dict(zip(values.to_pylist(), counts.to_pylist(), strict=True)))
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"column {column!r} holds text that is not UTF-8: {error}") from error


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
