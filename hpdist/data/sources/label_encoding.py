"""What is asked of whoever knows what labels mean, to read a column of them.

    stored = read_labels(table, "tags", where, name)
    encoding = reader.find_encoding(stored, num_classes=None)
    rows, notes = with_labels(stored, encoding.unlabeled(stored))
    labels = encoding.encode(stored, rows)

The labelled split decides how its column is read; every other set is read the same way. The readers
are the tasks of `hpdist.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from hpdist.aliases import find_moved
from hpdist.data.decode.encoded import Array
from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels
from hpdist.data.stream.permute import Int64Array
from hpdist.data.structures import Arrays

RowNumbers: TypeAlias = Sequence[int] | Int64Array
"""Numbers of rows of a split."""


class Encoding(Protocol):
    """How a column of labels is read.

    Labels of a set are one array, or arrays by name, whose first dimension is rows.
    """

    @property
    def classes(self) -> Classes:
        """The classes, or the targets' names."""
        ...

    @property
    def state(self) -> Mapping[str, Array]:
        """What was measured on the labelled rows, for a checkpoint; empty where nothing is."""
        ...

    def check(self, stored: StoredLabels) -> list[str]:
        """Say what a person should know of how another set's column is read.

        Raises DataError where it is of a type that does not fit.
        """
        ...

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows are marked as having no label, bool [rows]."""
        ...

    def encode(self, stored: StoredLabels, rows: RowNumbers) -> Any:
        """Give every row's labels, before `finish`.

        Raises DataError for the first of `rows` that has none.
        """
        ...

    def class_numbers(self, labels: Any) -> Array | None:
        """Give the class of each row, int64 [rows], of what `encode` gave.

        -1 where a row that is not used has none. None where a row is not of one class.
        """
        ...

    def describe(self, labels: Any, where: str, *, training: bool) -> list[str]:
        """Say what a person should know of the labels of the rows in use, as `encode` gave them."""
        ...

    def fitted(self, labels: Any, state: Mapping[str, Array] | None = None) -> Encoding:
        """Give the encoding for good: fitted on the labels in use, or with the state of before."""
        ...

    def finish(self, labels: Any) -> Arrays:
        """Give what `encode` gave as a `LabeledBatch` is to have it."""
        ...


class LabelReader(Protocol):
    """Says how labels are read: a task."""

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Say how the labelled split's column is read.

        `num_classes` is what the model's config says, `recorded` are the names of the classes of a
        run that goes on. Raises DataError where the column does not fit.
        """
        ...


def __getattr__(name: str) -> object:
    """Find the encodings, which were here before they went to their tasks."""
    return find_moved(__name__, name)
