"""Labels: which column holds them, which classes there are, and which labelled rows are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from hpdist.config import Labeled, LongTail
from hpdist.data.loading import known_column
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

_CHOICE = 0xC401CE  # keeps the draw of labels apart from everything else the seed feeds
ROUNDING = 1e-6  # of a row: a power that should be whole may come out a little less

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """The classes of the labelled split, which every other set is held to."""

    names: tuple[str, ...]
    named: bool  # labels are matched by name; otherwise by number

    def __len__(self) -> int:
        return len(self.names)


def label_column(features: Any, column: str | None, where: str) -> str:
    """Find the column of labels: as named, else the only ClassLabel, else `label` or `labels`."""
    if column is not None:
        return known_column(features, column, f"{where}.label")
    typed: list[str] = [key for key in features if isinstance(features[key], datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    for usual in ("label", "labels"):
        if usual in features:
            return usual
    raise DataError(f"{where}.label: name the column of labels; there are {', '.join(features)}")


def label_kind(feature: Any, where: str, column: str) -> str:
    """'class', 'string' or 'integer'."""
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    dtype = getattr(feature, "dtype", "")
    if dtype.endswith("string"):
        return "string"
    if dtype.startswith(("int", "uint", "bool")):
        return "integer"
    raise DataError(
        f"{where}.label: column {column!r} is {feature}; labels are classes, integers or strings"
    )


def list_classes(
    feature: Any, values: list[Any], num_classes: int | None, where: str, column: str
) -> Classes:
    """List the classes: ClassLabel's names, 0..largest, or the strings, sorted."""
    kind = label_kind(feature, where, column)
    present = {value for value in values if value is not None}
    if kind == "integer":
        count = num_classes or int(max(present, default=-1)) + 1
        return Classes(tuple(str(number) for number in range(count)), named=False)
    names = tuple(feature.names if kind == "class" else sorted(present))
    if num_classes is not None and num_classes != len(names):
        raise DataError(
            f"{where}.label: column {column!r} has {len(names)} classes, but model.num_classes is "
            f"{num_classes}; make them equal"
        )
    return Classes(names, named=True)


def label_ids(feature: Any, values: list[Any], classes: Classes) -> Int64Array:
    """Each row's class number; -1 where the label is null or none of the classes."""
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if classes.named and (names or any(isinstance(value, str) for value in values)):
        number: dict[Any, int] = {name: index for index, name in enumerate(classes.names)}
        if names is not None:
            number = {at: number[name] for at, name in enumerate(names) if name in number}
    else:
        number = {index: index for index in range(len(classes))}
    return np.fromiter((number.get(value, -1) for value in values), np.int64, len(values))


def check_labels(
    labels: Int64Array,
    values: list[Any],
    classes: Classes,
    rows: Sequence[int],
    name: str,
    column: str,
) -> None:
    """Raise DataError for the first of `rows` that has no class."""
    for row in rows:
        if labels[row] < 0:
            shown = ", ".join(classes.names[:12]) + (", …" if len(classes) > 12 else "")
            raise DataError(
                f"{name}: row {row} has the label {values[row]!r} in column {column!r}, which is "
                f"none of the {len(classes)} classes ({shown}); mend the row or leave it out"
            )


def check_indices(indices: list[int] | None, rows: int, setting: str) -> None:
    """Raise DataError for row numbers that are out of range or repeated."""
    if indices is None:
        return
    if not indices:
        raise DataError(f"{setting}: names no rows")
    seen: set[int] = set()
    for index in indices:
        if not 0 <= index < rows:
            raise DataError(
                f"{setting}: {index} is out of range; the split has rows 0 to {rows - 1}"
            )
        if index in seen:
            raise DataError(f"{setting}: {index} is repeated; name every row once")
        seen.add(index)


def draw_rows(
    config: Labeled, labels: Int64Array, classes: Classes, seed: int, where: str
) -> Int64Array:
    """Draw the labelled rows from the seed alone, so that every rank draws the same."""
    generator = np.random.default_rng([seed, _CHOICE])
    if config.rows is not None:
        if config.rows > len(labels):
            raise DataError(f"{where}.rows: {config.rows} asked for, the split has {len(labels)}")
        return generator.choice(len(labels), config.rows, replace=False)
    if config.labels_per_class is None:
        return np.arange(len(labels))
    shares = np.ones(len(classes)) if config.imbalance is None else tail(config, len(classes))
    sizes = sizes_of(config.labels_per_class, shares)
    return draw_sizes(sizes, labels, classes, generator, f"{where}.labels_per_class")


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
    pairs = zip(classes.names, sizes.tolist(), strict=True)
    for number, (class_name, wanted) in enumerate(pairs):
        of_class = np.flatnonzero(labels == number)
        if len(of_class) < wanted:
            raise DataError(
                f"{setting}: {wanted} asked for, class {class_name!r} has {len(of_class)}"
            )
        parts.append(generator.choice(of_class, wanted, replace=False))
    return np.concatenate(parts)
