"""Tables: vectors of numbers in one column, or numbers and categories in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
from torch import Tensor

from hpdist.data.decode.arrow_types import plain_column
from hpdist.data.decode.categories import (
    MOST,
    Categories,
    find_categories,
    is_category,
    is_number,
)
from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column, names_of
from hpdist.data.decode.vector import VectorSpec
from hpdist.data.kinds.base import (
    Context,
    Facts,
    FoundInput,
    InputKind,
    Recognised,
    TableOfRows,
)
from hpdist.data.kinds.columns import is_vector
from hpdist.data.kinds.first_rows import input_spec
from hpdist.data.kinds.image import IMAGE
from hpdist.data.kinds.registry import register
from hpdist.data.structures import Structure
from hpdist.errors import ConfigError, DataError
from hpdist.messages.progress import working

_LIKE_IDS = 20  # rows from which on a column that never repeats itself is taken for an id
_FEATURES = 30  # of a vector, that are shown
_TEXTS = "text"


class TableKind(InputKind):
    """Numbers and categories, and vectors."""

    name: ClassVar[str] = "table"
    held: ClassVar[str] = "vectors"
    joins_columns: ClassVar[bool] = True

    def recognise(self, feature: Any) -> Recognised | None:
        """See vectors where there is nothing else, and join numbers and categories."""
        if is_vector(feature):
            return Recognised("alone", self.held)
        if isinstance(feature, datasets.ClassLabel):
            return Recognised("joined", "a ClassLabel")
        if is_number(feature):
            return Recognised("joined", "numbers")
        return Recognised("joined", _TEXTS) if is_category(feature) else None

    def find_columns(
        self,
        features: Any,
        column: Column | list[str] | None,
        where: str,
        exclude: str | None = None,
    ) -> Column:
        """Find the columns as those of pixels are found, which lists make vectors of."""
        return IMAGE.find_columns(features, column, where, exclude)

    def join(
        self, table: Any, columns: list[str], held: Mapping[str, str | None], where: str
    ) -> FoundInput:
        """Take all columns of numbers and categories, but for those that only tell rows apart.

        `held` is what every column of the table holds. Raises DataError where none is left, or one
        has too many texts.
        """
        ids = [name for name in columns if _is_id(table, name)]
        kept = tuple(name for name in columns if name not in ids)
        others = [name for name in held if name not in columns]
        many = [name for name in kept if held[name] == _TEXTS and _count(table, name) > MOST]
        if many:
            rest = ", ".join(name for name in kept if name not in many)
            raise DataError(
                f"{where}.input: column {many[0]!r} has {_count(table, many[0])} different texts, "
                f"more than the {MOST} that become categories; name the columns to use, such as "
                f"{where}.input: [{rest}]; for a model of that text name it alone"
            )
        if not kept:
            texts = [name for name in ids if held[name] == _TEXTS]
            hint = f"; a model of text, such as hf:…, takes {texts[0]!r} as text" if texts else ""
            raise DataError(
                f"{where}.input: every column tells rows apart, as an id does ({', '.join(ids)}); "
                f"name the columns that the model is to see, as a list{hint}"
            )
        lines = [f"input: table, the columns {', '.join(kept)} of data.labeled"]
        if ids:
            lines.append(
                f"note: {where}: left out of the input, since no two rows have the same there, as "
                f"of an id: {', '.join(ids)}; {where}.input names the columns to use"
            )
        if others:
            lines.append(
                f"note: {where}: left out of the input, since they hold neither numbers nor "
                f"categories: {', '.join(others)}"
            )
        return FoundInput(self.name, kept, tuple(lines))

    def measure(self, views: Any, rows: TableOfRows, context: Context) -> Facts:
        """Find the categories of the labelled set's columns, as they were when the run began.

        They are those of all rows of the split, whether these are used or not. Raises DataError.
        """
        if isinstance(rows.column, str):
            return Facts()
        kept = _recorded(context.recorded)
        if kept is not None and kept.columns != rows.column:
            raise DataError(
                "data.labeled.input: the run that goes on began with the columns "
                f"{', '.join(kept.columns)}; name these, or choose another run.name"
            )
        found = kept or find_categories(rows.dataset, rows.column, rows.name)
        return Facts() if found is None else Facts(_values(found))

    @working("looking at the first rows")
    def make_spec(
        self, views: Any, rows: TableOfRows, context: Context, values: Mapping[str, Any]
    ) -> InputSpec:
        """Derive the number of features from the first row and the categories."""
        spec = input_spec(
            rows,
            getattr(views, "size", None),
            missing=getattr(views, "missing", None) == "mean",
            categories=_recorded(values),
            limits=context.limits,
        )
        if not isinstance(spec, VectorSpec) and getattr(views, "input_kind", None) == self.name:
            raise ConfigError(
                f"{self.setting}, but column {rows.column!r} holds images; set views.name: image"
            )
        return spec

    def measure_sets(
        self, spec: InputSpec, facts: Facts, sets: Mapping[str, Any], context: Context
    ) -> Facts:
        """Add the categories of unlabelled rows in tables, and say what becomes of all."""
        found = _recorded(facts.values)
        if found is None:
            return facts
        if _recorded(context.recorded) is None:  # those of a run that goes on stay
            for part in _tables(sets.get("data.unlabeled")):
                found = found.widened(part.dataset, names_of(part.column), part.name)
        return replace(facts, values=_values(found), lines=tuple(_described(found, sets)))

    def finish(
        self, spec: InputSpec, views: Any, given: Any, values: Mapping[str, Any]
    ) -> tuple[InputSpec, Any, str | None]:
        """Make a feature of every category that any set has."""
        found = _recorded(values)
        if found is None:
            return spec, views, None
        return cast(VectorSpec, spec).with_categories(found), views, None

    def is_record(self, found: Mapping[str, Any]) -> bool:
        """Tell whether a record's categories and columns are some."""
        categories, columns = found.get("categories", {}), found.get("columns", [])
        lists = ("columns", "names", "declared") if categories else ()
        return (
            isinstance(categories, dict)
            and all(isinstance(categories.get(key), list) for key in lists)
            and isinstance(columns, list)
            and all(isinstance(column, str) for column in columns)
        )

    def recorded_spec(self, values: Mapping[str, Any], folder: Path) -> InputSpec:
        """Make the spec of vectors again, with the categories of their columns."""
        found = values["categories"]
        categories = None if found is None else Categories.recorded(found)
        return restored(VectorSpec, values, categories=categories)

    def check_columns(self, spec: InputSpec, features: Any, column: Column, where: str) -> None:
        """Raise DataError where a column does not hold what the labelled set's does."""
        categories = getattr(spec, "categories", None)
        if categories is not None:
            categories.check(features, names_of(column), where)

    def draw(self, spec: InputSpec, rows: Structure, shown: Mapping[str, Structure]) -> list[str]:
        """Write a line for each feature: its value as it is stored, and as the views give it."""
        first, *others = cast(Mapping[str, Tensor], shown).values()
        stored = cast(Tensor, rows)
        values = [stored.double(), *(view.double() for view in others)]
        names = spec.feature_names or [str(number) for number in range(first.shape[1])]
        width = max(map(len, [*names[:_FEATURES], "feature"]))
        lines = []
        for row in range(len(stored)):
            lines.append(f"{'feature':{width}} " + "".join(f"{name:>12}" for name in shown))
            for feature, name in enumerate(names[:_FEATURES]):
                numbers = "".join(f"{view[row, feature].item():12.5g}" for view in values)
                lines.append(f"{name:{width}} {numbers}")
            lines.append("")
        left_out = len(names) - _FEATURES
        return [*lines[:-1], f"and {left_out} more features"] if left_out > 0 else lines[:-1]


def _values(categories: Categories) -> dict[str, Any]:
    return {"categories": categories.record()}


def _recorded(values: Mapping[str, Any]) -> Categories | None:
    return Categories.recorded(values["categories"]) if "categories" in values else None


def _described(categories: Categories, sets: Mapping[str, Any]) -> list[str]:
    """Say what becomes of categories, and which rows of which sets have a value that is none."""
    lines = [categories.line()]
    for name, rows in sets.items():
        parts = _tables(rows)
        for part in parts:
            lines += categories.strangers(part.dataset, names_of(part.column), name)
        if rows is not None and not parts:
            lines.append(
                f"note: {name} is a stream, and not read for its categories: a value that no row "
                "of data.labeled has is none of its column's, all 0; streaming: false adds those "
                "of a table"
            )
    return lines


def _tables(rows: Any) -> Sequence[Any]:
    """The parts of a set that are tables, which can be read as a whole."""
    parts = getattr(rows, "parts", (rows,))
    return [part for part in parts if isinstance(getattr(part, "dataset", None), datasets.Dataset)]


def _is_id(table: Any, name: str) -> bool:
    """Whether no two rows have the same text, or integers count the rows one by one."""
    feature, rows = table.features[name], len(table)
    whole = getattr(feature, "dtype", "").startswith(("int", "uint"))
    text = is_category(feature) and not isinstance(feature, datasets.ClassLabel)
    if rows < _LIKE_IDS or not (whole or text) or _count(table, name) < rows:
        return False
    if text:
        return True
    ends = pc.min_max(_stored(table, name)).as_py()
    return bool(ends["max"] - ends["min"] == rows - 1)


def _count(table: Any, name: str) -> int:
    """How many values a column has, without null."""
    return int(pc.count_distinct(_stored(table, name), mode="only_valid").as_py())


def _stored(table: Any, name: str) -> Any:
    return plain_column(table.select_columns([name]).with_format("arrow")[:].column(name))


TABLE = TableKind()
register(TABLE)
