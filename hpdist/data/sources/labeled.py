"""Open what the config names: labelled, test and unlabelled rows, checked before training starts.

    labeled = open_labeled(config.data.labeled, config.run.seed, labels=config.task.build())
    spec = hpdist.data.kinds.input_spec(labeled, size=32)
    unlabeled = open_unlabeled(config.data.unlabeled, labeled, spec)
    test = open_test(config.data.test, labeled, spec)

Rows are read through Hugging Face `datasets` in Arrow format, so that nothing is decoded before a
batch needs it and, of unlabelled rows, the label column is never read but to draw a long tail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hpdist.aliases import find_moved
from hpdist.data.config import LabelColumn, Labeled, Loading
from hpdist.data.decode.encoded import Array
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column, names_of, stored_inputs
from hpdist.data.files.named_files import NOTHING, PathRule, named
from hpdist.data.files.row_names import describe_row, describe_rows
from hpdist.data.kinds import DEFAULT_KIND, InputKind, kind_named
from hpdist.data.sources.classes import Classes, StoredLabels
from hpdist.data.sources.label_encoding import Encoding, LabelReader
from hpdist.data.sources.labels import (
    check_indices,
    check_labeled,
    draw_rows,
    label_column,
    read_labels,
    with_labels,
)
from hpdist.data.sources.loading import (
    check_order,
    open_table,
    same_column,
    same_input,
)
from hpdist.data.sources.own_files import limits_of
from hpdist.data.sources.parquet_table import rows_of
from hpdist.data.sources.placed_labels import place_labels
from hpdist.data.sources.unlabeled_value import describe_split, without_value
from hpdist.data.stream.functions import RowFunctions, Values
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.reader import Reader, Rows
from hpdist.data.stream.table import TableReader
from hpdist.data.structures import Arrays, take_rows
from hpdist.errors import DataError, one_line

_LABELED_ORDER = 0x1ABE1ED  # two sets of as many rows must not be walked in the same order
_UNLABELED_ORDER = 0xDA7A
_LOOKED_AT = 64  # rows at once, in search of one that can be decoded


@dataclass(frozen=True, eq=False)
class TableRows:
    """Rows of a map-style dataset, read by position and without decoding."""

    dataset: Any  # the columns that are needed, in Arrow format
    column: Column  # what the model sees
    name: str  # for messages: the setting and what it names
    ids: Int64Array  # [rows], each row's index in its split, ascending
    rule: PathRule = field(default=NOTHING, kw_only=True)
    """Which files the rows may name."""

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, positions: Int64Array) -> list[Any]:
        """Read the stored values at positions in 0..len(self).

        Raises DataError when the dataset's files cannot be read.
        """
        return self.read_split(self.ids[positions].tolist())

    def describe(self, row: int) -> str:
        """Name a row of the split, and its file where that is known, for messages."""
        return describe_row(self.dataset, row)

    def read_split(self, indices: list[int]) -> list[Any]:
        """Read the stored values at indices of the whole split."""
        if not indices:
            return []
        try:
            return named(stored_inputs(self.dataset[indices], self.column), self.rule)
        except Exception as error:
            raise DataError(
                f"{self.name}: cannot read {describe_rows(self.dataset, indices)}: "
                f"{one_line(error)}"
            ) from error


@dataclass(frozen=True, eq=False)
class LabeledRows(TableRows):
    """Rows of a map-style dataset with labels."""

    labels: Arrays  # [rows, *], as the task has them: an array, or arrays by name
    encoding: Encoding
    """How the labels were read."""
    label_column: str
    class_numbers: Int64Array | None
    """int64 [rows], in 0..len(classes); None where a row is not of one class."""
    notes: tuple[str, ...] = ()
    """What was decided about the rows that a person should know."""
    kind: InputKind = DEFAULT_KIND
    """What finds the column; every other set's column is of this kind too."""
    unlabeled_value: Any = False
    """What marks a row without a label, where the settings name that."""
    unlabeled_ids: Int64Array | None = None
    """[rows], the split's rows without a label, ascending, where they are the unlabelled set."""

    @property
    def classes(self) -> Classes:
        """The classes, or the targets' names."""
        return self.encoding.classes

    @property
    def chosen(self) -> list[int]:
        """The rows of the split that are used, ascending: what a resume passes back in."""
        return [int(row) for row in self.ids]

    def values(self, rows: Rows) -> Values:
        """The stored values of rows."""
        return RowFunctions(self.column, rule=self.rule).values(rows.table)

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Read the rows in epochs, mixed, with their labels."""
        key = (seed, _LABELED_ORDER)
        return TableReader(self.dataset, self.ids, self.labels, self.name, key)

    def changes(self) -> str:
        """Say what differs from the run that is resumed."""
        return "other labelled rows, or another order of them"


@dataclass(frozen=True, eq=False)
class UnlabeledTable(TableRows):
    """Rows of a map-style dataset without their labels."""

    functions: RowFunctions
    notes: tuple[str, ...] = ()
    """What was decided about the rows that a person should know."""

    def values(self, rows: Rows) -> Values:
        """The stored values of rows, after filter and map."""
        return self.functions.values(rows.table)

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Read the rows in epochs, mixed."""
        key = (seed, _UNLABELED_ORDER)
        return TableReader(self.dataset, self.ids, None, self.name, key)

    def changes(self) -> str:
        """Say what differs from the run that is resumed."""
        return "other rows"


def open_labeled(
    config: Labeled,
    seed: int,
    *,
    labels: LabelReader,
    num_classes: int | None = None,
    chosen: list[int] | None = None,
    dataset: Any = None,
    where: str = "data.labeled",
    kind: InputKind = DEFAULT_KIND,
    column: Column | None = None,
    classes: Sequence[str] | None = None,
    measured: Mapping[str, Array] | None = None,
    opened: tuple[Any, str, PathRule] | None = None,
    loading: Loading | None = None,
    once: Callable[[Callable[[], Any]], Any] = lambda read: read(),
) -> LabeledRows:
    """Open the labelled rows and choose those that are used, alike on every rank.

    `labels` is what knows how labels are read: a task. `dataset` is a `datasets.Dataset` to use
    instead of loading `config.path`; `chosen` are the rows of an earlier run, used instead of
    drawing, `classes` the names of its classes, and `measured` is the state of its encoding; `kind`
    is the kind of input, and `column` where it was found, if the config does not say; `opened` is
    what `open_table` gave, if that was called before; `once` calls what reads the labels, which a
    launched run does on one rank alone (`run_on_main`). Raises DataError when anything is not as
    the config says.
    """
    table, name, rule = opened or open_table(config, dataset, where, (), loading, in_place=True)
    features = table.features
    label = label_column(features, config.label, where)
    column = kind.find_columns(features, config.input or column, where, label)
    stored = read_labels(table, label, where, name, once)
    read = without_value(stored, config.unlabeled_value)
    encoding = labels.find_encoding(read, num_classes, classes)
    given = chosen if chosen is not None else config.indices
    setting = f"{where}.indices" if chosen is None else f"{where}: the recorded choice of rows"
    check_indices(given, len(table), setting)
    unlabeled = encoding.unlabeled(read)
    check_labeled(given, stored, unlabeled, setting)
    usable, notes = with_labels(stored, unlabeled)
    if config.marks_unlabeled:
        notes = describe_split(stored, unlabeled, config.unlabeled_value)
    encoded = encoding.encode(read, usable if given is None else given)
    numbers = encoding.class_numbers(encoded)
    drawn = (
        draw_rows(config, stored, numbers, usable, encoding.classes, seed)
        if given is None
        else given
    )
    ids = np.sort(np.asarray(drawn, dtype=np.int64))
    view, copied = rows_of(table, names_of(column), ids, where, chosen=True)
    inputs = TableRows(view, column, name, ids, rule=rule)
    used, placed = _place(encoding, take_rows(encoded, ids), inputs, stored, kind, loading)
    encoding = encoding.fitted(used, measured)
    notes += [*placed, *encoding.describe(used, where, training=True)]
    return LabeledRows(
        inputs.dataset,
        column,
        name,
        ids,
        encoding.finish(used),
        encoding,
        label,
        encoding.class_numbers(used),
        (*notes, *copied),
        kind,
        config.unlabeled_value,
        np.flatnonzero(unlabeled) if config.marks_unlabeled else None,
        rule=rule,
    )


class ReadAs(Protocol):
    """How the labelled set is read, which every other one is held to; `LabeledRows` says it."""

    @property
    def column(self) -> Column:
        """What the model sees."""
        ...

    @property
    def label_column(self) -> str:
        """The column of labels."""
        ...

    @property
    def kind(self) -> InputKind:
        """What finds the column."""
        ...

    @property
    def encoding(self) -> Encoding:
        """How labels are read."""
        ...

    @property
    def unlabeled_value(self) -> Any:
        """What marks a row without a label, where the settings name that; else False."""
        ...


def open_test(
    config: LabelColumn,
    like: ReadAs,
    spec: InputSpec,
    *,
    dataset: Any = None,
    where: str = "data.test",
    loading: Loading | None = None,
) -> LabeledRows:
    """Open all rows with a label of a set to measure on, read as the labelled split's are.

    Raises DataError when anything is not as the config says, or not one row can be decoded; single
    ones that cannot be are `hpdist.data.sources.held_out`'s to leave out.
    """
    needed = () if config.input else names_of(like.column)
    needed = needed if config.label else (*needed, like.label_column)
    table, name, rule = open_table(config, dataset, where, needed, loading, in_place=True)
    features = table.features
    label = label_column(features, config.label or same_column(like.label_column, features), where)
    found = config.input or same_input(like.column, features, where)
    column = like.kind.find_columns(features, found, where, label)
    check_order(column, like.column, where)
    kind_named(spec.kind).check_columns(spec, features, column, where)
    stored = read_labels(table, label, where, name)
    read = without_value(stored, like.unlabeled_value)
    encoding = like.encoding
    checked = encoding.check(read)
    usable, notes = with_labels(stored, encoding.unlabeled(read))
    notes += checked
    ids = np.asarray(usable, np.int64)
    view, copied = rows_of(table, names_of(column), ids, where, chosen=False)
    inputs = TableRows(view, column, name, ids, rule=rule)
    labels = take_rows(encoding.encode(read, usable), ids)
    labels, placed = _place(encoding, labels, inputs, stored, like.kind, loading)
    notes += [*placed, *encoding.describe(labels, where, training=False)]
    rows = LabeledRows(
        inputs.dataset,
        column,
        name,
        ids,
        encoding.finish(labels),
        encoding,
        label,
        encoding.class_numbers(labels),
        (*notes, *copied),
        like.kind,
        rule=rule,
    )
    _require_readable(rows, spec)
    return rows


def _place(
    encoding: Encoding,
    labels: Any,
    inputs: TableRows,
    stored: StoredLabels,
    kind: InputKind,
    loading: Loading | None,
) -> tuple[Any, list[str]]:
    """Place labels that have a place in the rows' pictures, and say what was noticed."""
    limits = limits_of(loading or Loading())
    return place_labels(encoding, labels, inputs.ids, stored, inputs.read_split, kind, limits)


def _require_readable(rows: LabeledRows, spec: InputSpec) -> None:
    """Look for a row that can be decoded, which the first one nearly always is."""
    reason, at, size = None, 0, 1
    while at < len(rows):
        ids = rows.ids[at : at + size].tolist()
        try:
            found = spec.decode_valid(rows.read_split(ids), spec.empty(len(ids)))
        except DataError as error:
            found = dict.fromkeys(range(len(ids)), str(error))
        if len(found) < len(ids):
            return
        reason = reason or found[0]
        at, size = at + size, _LOOKED_AT
    others = "" if len(rows) == 1 else f", and none of the other {len(rows) - 1} rows can be"
    raise DataError(
        f"{rows.name}: {rows.describe(int(rows.ids[0]))} cannot be decoded: {reason}{others}; mend "
        "or replace them"
    )


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
