"""What a labelled row is labelled with: a class, several classes, or numbers.

    stored = read_labels(table, "tags", where, name)
    encoding = find_encoding(config.task, stored, num_classes=None)
    rows, notes = with_labels(stored, encoding.unlabeled(stored))
    labels = encoding.encode(stored, rows)

The labelled split decides how its column is read; every other set is read the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets
import numpy as np

from hpdist.data.config import TaskChoice
from hpdist.data.decode.encoded import Array
from hpdist.data.decode.written import is_mark, shortened
from hpdist.data.sources.classes import (
    BoolArray,
    Classes,
    StoredLabels,
    check_match,
    label_kind,
    list_classes,
    marked,
    number_labels,
)
from hpdist.data.sources.labels import Float64Array, check_labels
from hpdist.errors import DataError

_LISTS = (datasets.List, datasets.LargeList)
_NUMBERS = ("int", "uint", "float", "double", "bool", "decimal")


@dataclass(frozen=True, eq=False)
class Scale:
    """The mean and standard deviation of the targets of the labelled rows in use."""

    mean: Float64Array  # [targets]
    std: Float64Array  # [targets], 1 where a target never changes

    @classmethod
    def of(cls, targets: Array) -> Scale:
        """Measure targets [rows, targets]."""
        mean, std = targets.mean(axis=0), targets.std(axis=0)
        still = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)  # only rounding is left
        return cls(mean, np.where(still, 1.0, std))


class Encoding(Protocol):
    """How a column of labels is read."""

    @property
    def classes(self) -> Classes:
        """The classes, or the targets' names."""
        ...

    @property
    def scale(self) -> Scale | None:
        """What numbers are standardised by, once that is fitted."""
        ...

    def check(self, stored: StoredLabels) -> list[str]:
        """Say what a person should know of how another set's column is read.

        Raises DataError where it is of a type that does not fit.
        """
        ...

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows are marked as having no label, bool [rows]."""
        ...

    def encode(self, stored: StoredLabels, rows: Sequence[int]) -> Array:
        """Every row's labels, as a `LabeledBatch` has them.

        Raises DataError for the first of `rows` that has none.
        """
        ...

    def describe(self, labels: Array, where: str, *, training: bool) -> list[str]:
        """Say what a person should know of the labels of the rows in use."""
        ...

    def fitted(self, labels: Array, scale: Scale | None = None) -> Encoding:
        """Give the encoding for good: fitted on the labels in use, or with a given scale."""
        ...

    def finish(self, labels: Array) -> Array:
        """What `encode` gave as the model is to see it."""
        ...


@dataclass(frozen=True)
class OneClass:
    """A class of each row: int64 [rows]; -1 where a row that is not used has none."""

    classes: Classes
    scale: None = None

    def check(self, stored: StoredLabels) -> list[str]:
        """Hold the labels to the classes, by value; see `check_match`."""
        return check_match(stored, self.classes)

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows are marked by null, NaN, an empty text or -1."""
        return marked(stored.values, self.classes.minus_one)

    def encode(self, stored: StoredLabels, rows: Sequence[int]) -> Array:
        """The class numbers."""
        labels = number_labels(stored, self.classes)
        check_labels(labels, stored, self.classes, rows)
        return labels

    def describe(self, labels: Array, where: str, *, training: bool) -> list[str]:
        """Name the classes without a row, and a class that is alone."""
        counts = np.bincount(labels, minlength=len(self.classes))
        return _missing(self.classes, counts, where, training)

    def fitted(self, labels: Array, scale: Scale | None = None) -> Encoding:
        """Nothing to fit."""
        return self

    def finish(self, labels: Array) -> Array:
        """As they are."""
        return labels


@dataclass(frozen=True)
class ManyClasses:
    """Any number of classes of each row, from lists: 0/1 fp32 [rows, classes].

    A list holds the row's classes (`ids`), or 0 or 1 for every class (`vector`).
    """

    classes: Classes
    vector: bool
    scale: None = None

    def check(self, stored: StoredLabels) -> list[str]:
        """Hold the lists to the classes, by value; raise DataError unless there are lists."""
        inner = _inner(stored)
        return (
            [] if self.vector else check_match(stored.of(inner, _flat(stored.values)), self.classes)
        )

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows have null or a list of marks; an empty list is a row of no class."""
        minus_one = self.classes.minus_one
        blank = (_is_blank(value, minus_one) for value in stored.values)
        return np.fromiter(blank, bool, len(stored.values))

    def encode(self, stored: StoredLabels, rows: Sequence[int]) -> Array:
        """A column for every class."""
        labels = np.zeros((len(stored.values), len(self.classes)), np.float32)
        used = set(rows)
        numbers = {} if self.vector else self._numbers(stored)
        for row, value in enumerate(stored.values):
            reason = "it is null" if value is None else self._fill(labels[row], value, numbers)
            if reason is not None and row in used:
                raise DataError(stored.refusal(row, f": {reason}"))
        return labels

    def _numbers(self, stored: StoredLabels) -> dict[Any, int]:
        """The class of every label that a list holds."""
        labels = stored.of(_inner(stored), _flat(stored.values))
        return dict(zip(labels.values, number_labels(labels, self.classes).tolist(), strict=True))

    def _fill(self, out: Array, value: list[Any], numbers: dict[Any, int]) -> str | None:
        if self.vector:
            if len(value) != len(out):
                return f"it has {len(value)} values for {len(out)} classes"
            if any(v not in (0, 1) for v in value):  # None is in neither
                return "its values are not all 0 or 1"
            out[:] = value
            return None
        found = [numbers.get(label, -1) for label in value]
        if -1 in found:
            wrong = value[found.index(-1)]
            return f"{wrong!r} is none of the {len(out)} classes ({self.classes.shown})"
        out[found] = 1
        return None

    def describe(self, labels: Array, where: str, *, training: bool) -> list[str]:
        """Name the classes that no row has."""
        return _missing(self.classes, labels.sum(axis=0), where, training)

    def fitted(self, labels: Array, scale: Scale | None = None) -> Encoding:
        """Nothing to fit."""
        return self

    def finish(self, labels: Array) -> Array:
        """As they are."""
        return labels


@dataclass(frozen=True)
class Numbers:
    """One or several numbers of each row: fp32 [rows, targets], standardised."""

    classes: Classes
    scale: Scale | None = None

    def check(self, stored: StoredLabels) -> list[str]:
        """Raise DataError unless it holds numbers, or lists of numbers."""
        _check_numbers(stored)
        return []

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows have null or NaN, or a list of nothing else."""
        return np.fromiter((_is_blank(value) for value in stored.values), bool, len(stored.values))

    def encode(self, stored: StoredLabels, rows: Sequence[int]) -> Array:
        """The targets in their own units, float64; NaN where a row that is not used has none."""
        targets = np.full((len(stored.values), len(self.classes)), np.nan)
        used = set(rows)
        for row, value in enumerate(stored.values):
            reason = self._fill(targets[row], value)
            if reason is not None and row in used:
                raise DataError(stored.refusal(row, f": {reason}"))
        return targets

    def _fill(self, out: Array, value: Any) -> str | None:
        if value is None:
            return "it is null"
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) != len(out):
            return f"it has {len(numbers)} numbers, the first labelled row has {len(out)}"
        if any(number is None for number in numbers):
            return "it holds nulls"
        out[:] = numbers
        return None if np.isfinite(out).all() else "it is not finite"

    def describe(self, labels: Array, where: str, *, training: bool) -> list[str]:
        """Say nothing: numbers have no classes."""
        return []

    def fitted(self, labels: Array, scale: Scale | None = None) -> Numbers:
        """With the scale of these rows."""
        return replace(self, scale=Scale.of(labels) if scale is None else scale)

    def finish(self, labels: Array) -> Array:
        """Standardised, fp32; in float64 up to there, so that a large mean costs nothing."""
        assert self.scale is not None
        return ((labels - self.scale.mean) / self.scale.std).astype(np.float32)


def find_encoding(
    task: TaskChoice,
    stored: StoredLabels,
    num_classes: int | None,
    recorded: Sequence[str] | None = None,
) -> Encoding:
    """How the labelled split's column is read; `recorded` are the classes of a run that goes on.

    Raises DataError where the column does not fit the task.
    """
    if task.name == "regression":
        return _numbers(stored, num_classes)
    if task.name == "multilabel":
        return _many_classes(task, stored, num_classes, recorded)
    return _one_class(stored, num_classes, recorded)


def _one_class(stored: StoredLabels, count: int | None, recorded: Sequence[str] | None) -> Encoding:
    if isinstance(stored.feature, _LISTS):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} holds lists; for several classes of a "
            "row set task.name: multilabel, for several numbers task.name: regression"
        )
    return OneClass(list_classes(stored, count, recorded))


def _many_classes(
    task: TaskChoice, stored: StoredLabels, count: int | None, recorded: Sequence[str] | None
) -> Encoding:
    inner = _inner(stored)
    lists = [value for value in stored.values if not _is_blank(value, minus_one=True)]
    vector = _is_vector(task, stored, inner, lists)
    if vector:
        width = getattr(stored.feature, "length", -1)
        width = width if width > 0 else max(map(len, lists), default=0)
        if count not in (None, width):
            raise DataError(
                f"{stored.where}.label: column {stored.column!r} has lists of {width}, but "
                f"model.num_classes is {count}; make them equal"
            )
        classes = Classes(tuple(str(number) for number in range(width)))
    else:
        classes = list_classes(stored.of(inner, _flat(lists)), count, recorded)
    if len(classes) < 2:
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} has {len(classes)} classes, and "
            "task.name: multilabel needs two or more; for one yes or no use task.name: "
            "classification"
        )
    return ManyClasses(classes, vector)


def _is_vector(task: TaskChoice, stored: StoredLabels, inner: Any, lists: list[Any]) -> bool:
    """Whether lists hold 0 or 1 for every class, in place of the numbers of a row's classes."""
    if task.labels != "auto":
        return task.labels == "vector"
    kind = label_kind(inner, stored.where, stored.column)
    if kind in ("class", "text", "bytes", "time"):
        return False
    if getattr(stored.feature, "length", -1) > 0 or kind in ("number", "boolean"):
        return True
    lengths = {len(value) for value in lists}
    if len(lengths) != 1 or lengths <= {0, 1} or set(_flat(lists)) - {0, 1}:
        return False
    if any(len(set(value)) < len(value) for value in lists):
        return True  # a list of classes names each once
    raise DataError(
        f"{stored.where}.label: column {stored.column!r} holds pairs of 0 and 1, which may be the "
        "numbers of a row's classes, or a 0 or 1 for each of two; set task.labels: ids, or "
        "task.labels: vector"
    )


def _numbers(stored: StoredLabels, count: int | None) -> Encoding:
    _check_numbers(stored)
    column = stored.column
    first = next((value for value in stored.values if not _is_blank(value)), None)
    width = len(first) if isinstance(first, list) else 1
    if count not in (None, width):
        raise DataError(
            f"{stored.where}.label: column {column!r} has {width} targets, but model.num_classes "
            f"is {count}; make them equal"
        )
    names = [column] if width == 1 else [f"{column}[{number}]" for number in range(width)]
    return Numbers(Classes(tuple(names)))


def _inner(stored: StoredLabels) -> Any:
    """What the lists of a column hold; raises DataError where it holds none."""
    feature = stored.feature
    if not isinstance(feature, _LISTS):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {feature}; task.name: multilabel "
            "needs lists, of a row's classes or of a 0 or 1 for every class"
        )
    label_kind(feature.feature, stored.where, stored.column)
    return feature.feature


def _check_numbers(stored: StoredLabels) -> None:
    feature = stored.feature
    inner = feature.feature if isinstance(feature, _LISTS) else feature
    kind = getattr(inner, "dtype", "")
    if isinstance(inner, datasets.ClassLabel) or not kind.startswith(_NUMBERS):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {feature}; task.name: regression "
            "needs a number, or a list of as many numbers, of every row"
        )


def _is_blank(value: Any, minus_one: bool = False) -> bool:
    """Whether a row is marked as one without labels: by a mark, or a list of nothing else."""
    if isinstance(value, list):
        return bool(value) and all(is_mark(one, minus_one) for one in value)
    return is_mark(value)


def _missing(classes: Classes, counts: Array, where: str, training: bool) -> list[str]:
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


def _flat(lists: Iterable[Any]) -> Iterable[Any]:
    return (value for one in lists if one is not None for value in one if value is not None)
