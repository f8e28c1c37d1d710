"""A value that marks the rows of a table without a label, which become the unlabelled set.

read = without_value(stored, -1)      # the same column with null in those rows
unlabeled = encoding.unlabeled(read)  # bool [rows]
"""

from __future__ import annotations

from typing import Any

import datasets

from hpdist.data.decode.written import spelling
from hpdist.data.sources.classes import BoolArray, StoredLabels
from hpdist.data.sources.coded import CodedValues
from hpdist.data.sources.labels import marks_of
from hpdist.errors import DataError


def without_value(stored: StoredLabels, value: Any) -> StoredLabels:
    """Give a column of labels with null in place of a value.

    A value matches however it is written (-1, -1.0 and "-1"), and a list that holds nothing else
    matches too. False and null stand for no such value. Raises DataError where a ClassLabel has it
    as a class.
    """
    if value is False or value is None:
        return stored
    if isinstance(stored.feature, datasets.ClassLabel):
        _check_no_class(stored, value)
    wanted = spelling(value)
    known: dict[Any, bool] = {}  # a column has few different labels

    def matches(label: Any) -> bool:
        if isinstance(label, list):
            return bool(label) and all(map(matches, label))
        if isinstance(label, dict):  # objects in a picture: none are marked by a value
            return False
        if label not in known:
            known[label] = not isinstance(label, bool) and (
                label == value or (wanted is not None and spelling(label) == wanted)
            )
        return known[label]

    def kept(label: Any) -> Any:
        return None if matches(label) else label

    if isinstance(stored.values, CodedValues):
        return stored.of(stored.feature, stored.values.replaced(kept))
    return stored.of(stored.feature, map(kept, stored.values))


def _check_no_class(stored: StoredLabels, value: Any) -> None:
    names = list(stored.feature.names)
    number = isinstance(value, int) and 0 <= value < len(names)
    if number or value in names:
        name = names[value] if number else value
        raise DataError(
            f"{stored.where}.unlabeled_value: {value!r} is the class {name!r} of column "
            f"{stored.column!r}, a ClassLabel; store -1 or null in the rows without a label, or "
            "cast the column to another type"
        )


def describe_split(stored: StoredLabels, unlabeled: BoolArray, value: Any) -> list[str]:
    """Say how many rows have a label, and that the others are the unlabelled set.

    Raises DataError where every row has a label.
    """
    rows, count = len(unlabeled), int(unlabeled.sum())
    if not count:
        shown = "null" if value is None else repr(value)
        raise DataError(
            f"{stored.where}.unlabeled_value: no row has {shown} in column {stored.column!r}, so "
            "there would be no unlabelled rows; name the value that stands for no label, or leave "
            "it out"
        )
    marks = marks_of(stored, unlabeled)
    return [
        f"{stored.where}: {rows - count} of {rows} rows have a label in column {stored.column!r}; "
        f"the other {count} ({marks}) are the unlabelled set"
    ]
