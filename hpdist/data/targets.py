"""What a labelled row is labelled with: a class, several classes, or numbers.

    encoding = find_encoding(config.task, table.features["tags"], values, None, where, "tags")
    labels = encoding.encode(feature, values, range(len(values)), name, "tags")

The labelled split decides how its column is read; every other set is read the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets
import numpy as np

from hpdist.config import TaskChoice
from hpdist.data.decode import Array
from hpdist.data.labels import (
    Classes,
    Float64Array,
    check_labels,
    label_ids,
    label_kind,
    list_classes,
)
from hpdist.errors import DataError

_LISTS = (datasets.List, datasets.LargeList)
_NUMBERS = ("int", "uint", "float", "double", "bool")


@dataclass(frozen=True, eq=False)
class Scale:
    """Of targets: the mean and standard deviation of the labelled rows in use."""

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

    def check(self, feature: Any, where: str, column: str) -> None:
        """Raise DataError where another set's column is of another type."""
        ...

    def encode(
        self, feature: Any, values: list[Any], rows: Sequence[int], name: str, column: str
    ) -> Array:
        """Every row's labels, as a `LabeledBatch` has them.

        Raises DataError for the first of `rows` that has none.
        """
        ...

    def fitted(self, labels: Array, scale: Scale | None = None) -> Encoding:
        """The same for good: fitted on the labels of the rows in use, or with a given scale."""
        ...

    def finish(self, labels: Array) -> Array:
        """What `encode` gave as the model is to see it."""
        ...


@dataclass(frozen=True)
class OneClass:
    """A class of each row: int64 [rows]; -1 where a row that is not used has none."""

    classes: Classes
    scale: None = None

    def check(self, feature: Any, where: str, column: str) -> None:
        """Raise DataError unless it holds classes, integers or strings."""
        label_kind(feature, where, column)

    def encode(
        self, feature: Any, values: list[Any], rows: Sequence[int], name: str, column: str
    ) -> Array:
        """The class numbers."""
        labels = label_ids(feature, values, self.classes)
        check_labels(labels, values, self.classes, rows, name, column)
        return labels

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

    def check(self, feature: Any, where: str, column: str) -> None:
        """Raise DataError unless it holds lists of the same kind."""
        _inner(feature, where, column)

    def encode(
        self, feature: Any, values: list[Any], rows: Sequence[int], name: str, column: str
    ) -> Array:
        """A column for every class."""
        labels = np.zeros((len(values), len(self.classes)), np.float32)
        used = set(rows)
        inner = getattr(feature, "feature", None)
        for row, value in enumerate(values):
            reason = "it is null" if value is None else self._fill(labels[row], value, inner)
            if reason is not None and row in used:
                raise DataError(_refusal(name, row, value, column, reason))
        return labels

    def _fill(self, out: Array, value: list[Any], inner: Any) -> str | None:
        if self.vector:
            if len(value) != len(out):
                return f"it has {len(value)} values for {len(out)} classes"
            if any(v not in (0, 1) for v in value):  # None is in neither
                return "its values are not all 0 or 1"
            out[:] = value
            return None
        numbers = label_ids(inner, value, self.classes)
        if (numbers < 0).any():
            wrong = value[int((numbers < 0).argmax())]
            return f"{wrong!r} is none of the {len(out)} classes"
        out[numbers] = 1
        return None

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

    def check(self, feature: Any, where: str, column: str) -> None:
        """Raise DataError unless it holds numbers, or lists of numbers."""
        _check_numbers(feature, where, column)

    def encode(
        self, feature: Any, values: list[Any], rows: Sequence[int], name: str, column: str
    ) -> Array:
        """The targets in their own units, float64; NaN where a row that is not used has none."""
        targets = np.full((len(values), len(self.classes)), np.nan)
        used = set(rows)
        for row, value in enumerate(values):
            reason = self._fill(targets[row], value)
            if reason is not None and row in used:
                raise DataError(_refusal(name, row, value, column, reason))
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

    def fitted(self, labels: Array, scale: Scale | None = None) -> Numbers:
        """With the scale of these rows."""
        return replace(self, scale=Scale.of(labels) if scale is None else scale)

    def finish(self, labels: Array) -> Array:
        """Standardised, fp32; in float64 up to there, so that a large mean costs nothing."""
        assert self.scale is not None
        return ((labels - self.scale.mean) / self.scale.std).astype(np.float32)


def find_encoding(
    task: TaskChoice,
    feature: Any,
    values: list[Any],
    num_classes: int | None,
    where: str,
    column: str,
) -> Encoding:
    """How the labelled split's column is read. Raises DataError where it does not fit the task."""
    return _FINDERS[task.name](task, feature, values, num_classes, where, column)


def _one_class(
    task: TaskChoice, feature: Any, values: list[Any], count: int | None, where: str, column: str
) -> Encoding:
    if isinstance(feature, _LISTS):
        raise DataError(
            f"{where}.label: column {column!r} holds lists; for several classes of a row set "
            "task.name: multilabel, for several numbers task.name: regression"
        )
    return OneClass(list_classes(feature, values, count, where, column))


def _many_classes(
    task: TaskChoice, feature: Any, values: list[Any], count: int | None, where: str, column: str
) -> Encoding:
    inner = _inner(feature, where, column)
    lists = [value for value in values if value is not None]
    vector = _is_vector(task, feature, inner, lists, where, column)
    if vector:
        width = getattr(feature, "length", -1)
        width = width if width > 0 else max(map(len, lists), default=0)
        if count not in (None, width):
            raise DataError(
                f"{where}.label: column {column!r} has lists of {width}, but model.num_classes is "
                f"{count}; make them equal"
            )
        classes = Classes(tuple(str(number) for number in range(width)), named=False)
    else:
        classes = list_classes(inner, list(_flat(lists)), count, where, column)
    if len(classes) < 2:
        raise DataError(
            f"{where}.label: column {column!r} has {len(classes)} classes, and task.name: "
            "multilabel needs two or more; for one yes or no use task.name: classification"
        )
    return ManyClasses(classes, vector)


def _is_vector(
    task: TaskChoice, feature: Any, inner: Any, lists: list[Any], where: str, column: str
) -> bool:
    """Whether lists hold 0 or 1 for every class, in place of the numbers of a row's classes."""
    if task.labels != "auto":
        return task.labels == "vector"
    kind = getattr(inner, "dtype", "")
    if isinstance(inner, datasets.ClassLabel) or kind.endswith("string"):
        return False
    if getattr(feature, "length", -1) > 0 or kind.startswith(("float", "double", "bool")):
        return True
    lengths = {len(value) for value in lists}
    if len(lengths) != 1 or lengths <= {0, 1} or set(_flat(lists)) - {0, 1}:
        return False
    if any(len(set(value)) < len(value) for value in lists):
        return True  # a list of classes names each once
    raise DataError(
        f"{where}.label: column {column!r} holds pairs of 0 and 1, which may be the numbers of a "
        "row's classes, or a 0 or 1 for each of two; set task.labels: ids, or task.labels: vector"
    )


def _numbers(
    task: TaskChoice, feature: Any, values: list[Any], count: int | None, where: str, column: str
) -> Encoding:
    _check_numbers(feature, where, column)
    first = next((value for value in values if value is not None), None)
    width = len(first) if isinstance(first, list) else 1
    if not width:
        raise DataError(f"{where}.label: column {column!r} begins with an empty list of targets")
    if count not in (None, width):
        raise DataError(
            f"{where}.label: column {column!r} has {width} targets, but model.num_classes is "
            f"{count}; make them equal"
        )
    names = [column] if width == 1 else [f"{column}[{number}]" for number in range(width)]
    return Numbers(Classes(tuple(names), named=True))


_FINDERS = {"classification": _one_class, "multilabel": _many_classes, "regression": _numbers}


def _inner(feature: Any, where: str, column: str) -> Any:
    """What the lists of a column hold; raises DataError where it holds none."""
    if not isinstance(feature, _LISTS):
        raise DataError(
            f"{where}.label: column {column!r} is {feature}; task.name: multilabel needs lists, of "
            "a row's classes or of a 0 or 1 for every class"
        )
    inner = feature.feature
    if not getattr(inner, "dtype", "").startswith(("float", "double")):
        label_kind(inner, where, column)
    return inner


def _check_numbers(feature: Any, where: str, column: str) -> None:
    inner = feature.feature if isinstance(feature, _LISTS) else feature
    kind = getattr(inner, "dtype", "")
    if isinstance(inner, datasets.ClassLabel) or not kind.startswith(_NUMBERS):
        raise DataError(
            f"{where}.label: column {column!r} is {feature}; task.name: regression needs a number, "
            "or a list of as many numbers, of every row"
        )


def _flat(lists: Iterable[Any]) -> Iterable[Any]:
    return (value for one in lists for value in one if value is not None)


def _refusal(name: str, row: int, value: Any, column: str, reason: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return (
        f"{name}: row {row} has the label {shown} in column {column!r}: {reason}; mend the row or "
        "leave it out"
    )
