"""Long-tailed unlabelled sets: drawn from a table by its labels, which are then forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpdist.data.config import UnlabeledSource
from hpdist.data.sources.classes import Classes, check_match, marked, number_labels
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.sources.labels import (
    ROUNDING,
    check_labels,
    draw_sizes,
    label_column,
    read_labels,
    sizes_of,
    tail,
    with_labels,
)
from hpdist.data.sources.loading import same_column
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

_CHOICE = 0x7A11  # keeps this draw apart from everything else the seed feeds


def rows_used(
    config: UnlabeledSource, table: Any, like: LabeledRows, seed: int, where: str, name: str
) -> tuple[Int64Array, list[str]]:
    """The rows of a table that are used, ascending: all, or those of a long tail.

    It follows from the seed and the table alone, so that every rank draws the same. Also gives what
    a person should know of it. Raises DataError where a class has too few rows, or a row's label is
    none of the classes; a row without a label is never drawn.
    """
    if config.imbalance is None:
        return np.arange(len(table)), []
    features = table.features
    column = config.label or same_column(like.label_column, features)
    column = label_column(features, column, where)
    stored, classes = read_labels(table, column, where, name), like.classes
    usable, notes = with_labels(stored, marked(stored.values, classes.minus_one))
    notes += check_match(stored, classes)
    labels = number_labels(stored, classes)
    check_labels(labels, stored, classes, usable)
    return np.sort(_draw(config, labels, classes, seed, where)), notes


def _draw(
    config: UnlabeledSource, labels: Int64Array, classes: Classes, seed: int, where: str
) -> Int64Array:
    assert config.imbalance is not None
    shares = tail(config, len(classes))
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    most, setting = config.rows_per_class, f"{where}.rows_per_class"
    if most is None:
        most, setting = int(np.floor(counts / shares + ROUNDING).min()), f"{where}.imbalance"
    sizes = sizes_of(most, shares)
    if not sizes.all():
        fewest = int((counts / shares).argmin())
        raise DataError(
            f"{setting}: {most} rows of the most frequent class and imbalance {config.imbalance:g} "
            f"leave a class without any; class {classes.names[fewest]!r} has {counts[fewest]} rows "
            "in all; lower the imbalance"
        )
    return draw_sizes(sizes, labels, classes, np.random.default_rng([seed, _CHOICE]), setting)
