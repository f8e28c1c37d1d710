"""Classes: the labels that are there, by value, whatever type they are stored in.

    classes = list_classes(stored, num_classes=None)
    numbers = number_labels(stored, classes)  # int64 [rows], -1 of no class

A label is known by how it is written: 10, 10.0, Decimal("10.00") and "10" are one class, "010" and
"10.0" are others. So a set may store its labels in another type than the labelled set does. Classes
come in the order of their numbers or dates, strings alphabetically, False before True, and those of
a ClassLabel as it has them, with the names that no row bears.

A row may be marked as one without a label: by null, NaN, an empty text, or -1 where the other
labels are a ClassLabel's, numbers that are not negative, or texts that are no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt

from hpdist.data.decode.written import is_mark, is_minus_one, shortened, spelling
from hpdist.data.sources.coded import CodedValues
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Kind: TypeAlias = Literal["class", "boolean", "integer", "number", "text", "bytes", "time", "null"]

_WAY_OUT = "mend the row or leave it out"
_KINDS: Mapping[str, Kind] = {
    "bool": "boolean",
    "int": "integer",
    "uint": "integer",
    "float": "number",
    "halffloat": "number",
    "double": "number",
    "decimal": "number",
    "string": "text",
    "large_string": "text",
    "binary": "bytes",
    "large_binary": "bytes",
    "fixed_size_binary": "bytes",
    "date": "time",
    "time": "time",
    "null": "null",
}
"""What labels are, by how their dtype begins."""
_YES_AND_NO = {"False": ("0", "false", "FALSE"), "True": ("1", "true", "TRUE")}
_EQUIVALENT: Mapping[Kind, Kind] = {"class": "text", "bytes": "text", "integer": "number"}
"""Kinds of labels between which matching by how they are written is no surprise."""


@dataclass(frozen=True)
class Classes:
    """The classes of the labelled split, which every other set is held to."""

    names: tuple[str, ...]
    kind: Kind = "integer"
    stored: str = "integers"
    """How the labelled split stores them, for messages."""
    note: str | None = None
    """What was decided about them that a person should know."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def declared(self) -> bool:
        """Whether they are those of a ClassLabel, whose integers are their places."""
        return self.kind == "class"

    @property
    def shown(self) -> str:
        """The first names, for messages."""
        return shortened(self.names)

    @property
    def minus_one(self) -> bool:
        """Whether -1 marks a row without a label."""
        return self.declared or not any(_is_negative(name) for name in self.names)

    @property
    def index(self) -> dict[str, int]:
        """Each class's number, by every way in which it may be written."""
        found = {name: number for number, name in enumerate(self.names)}
        folded = {other: name for name, others in _YES_AND_NO.items() for other in (name, *others)}
        meant = [folded.get(name) for name in self.names]
        if sorted(filter(None, meant)) == ["False", "True"] and len(meant) == 2:
            aliases = {text: meant.index(folded[text]) for text in folded}
            found = {**aliases, **found}
        return found


@dataclass(frozen=True, eq=False)
class StoredLabels:
    """A set's column of labels, as it is stored."""

    feature: Any
    values: Sequence[Any]  # a list, or CodedValues where few are different
    where: str  # the setting of the set
    name: str  # the setting and what it names, for messages
    column: str
    describe: Callable[[int], str]
    """Names a row, for messages."""

    def of(self, feature: Any, values: Iterable[Any]) -> StoredLabels:
        """Give the same column with other values, such as those of all its lists."""
        kept = values if isinstance(values, CodedValues) else list(values)
        return StoredLabels(feature, kept, self.where, self.name, self.column, self.describe)

    def refusal(self, row: int, reason: str, way_out: str = _WAY_OUT) -> str:
        """Say what is wrong with a row's label, and what to do."""
        shown = _shown_label(self.feature, self.values[row])
        return (
            f"{self.name}: {self.describe(row)} has the label {shown} in column {self.column!r}"
            f"{reason}; {way_out}"
        )


def label_kind(feature: Any, where: str, column: str) -> Kind:
    """Say what a column's labels are; raises DataError where they cannot be classes."""
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    stem = dtype.partition("[")[0].partition("(")[0].removesuffix("_view").rstrip("0123456789")
    if stem in _KINDS or stem == "timestamp":
        return _KINDS.get(stem, "time")
    raise DataError(
        f"{where}.label: column {column!r} is {feature}; labels are classes: integers or strings, "
        "or what can be written as one, such as booleans and dates"
    )


def plain_labels(feature: Any, values: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Give labels of a JSON column in which types are mixed as those of one type.

    That is the type of all that are no marks, else text. Other columns stay as they are, and so do
    objects and lists.
    """
    mixed = getattr(datasets, "Json", None)
    if mixed is None or not isinstance(feature, mixed):
        return feature, values
    read = [value if value is None else json.loads(value) for value in values]
    labels = [value for value in read if not is_mark(value)]
    if any(isinstance(value, (dict, list)) for value in labels):
        return feature, values
    kinds = {type(value) for value in labels if not is_minus_one(value)} or {int}
    if kinds <= {int, float}:
        dtype = "float64" if float in kinds else "int64"
        plain = [
            None if is_mark(value) else int(value) if value == "-1" else value for value in read
        ]
        return datasets.Value(dtype), plain
    if kinds == {bool}:
        return datasets.Value("bool"), [v if isinstance(v, bool) else None for v in read]
    return datasets.Value("string"), [None if v is None else spelling(v) or str(v) for v in read]


def list_classes(
    stored: StoredLabels,
    num_classes: int | None,
    recorded: Sequence[str] | None = None,
    way_out: str = "write classes as integers or strings",
) -> Classes:
    """List the classes of the labelled split.

    With `num_classes`, integers that all lie in 0..num_classes - 1 have as many classes, also those
    that no row bears. `recorded` are the names of the run that goes on, which stay as they were
    where all labels are among them. Raises DataError; `way_out` says what to do where a label is no
    whole number.
    """
    feature, where, column = stored.feature, stored.where, stored.column
    kind = label_kind(feature, where, column)
    if kind == "class":
        found = Classes(tuple(feature.names), kind, "a ClassLabel")
    else:
        found = _list_present(stored, kind, way_out)
    if recorded is not None and Classes(tuple(recorded)).index.keys() >= set(found.names):
        return replace(found, names=tuple(recorded))
    if num_classes is None or num_classes == len(found):
        return found
    fits = (_is_whole(name) and 0 <= int(name) < num_classes for name in found.names)
    if kind in ("integer", "number") and all(fits):
        return replace(found, names=tuple(map(str, range(num_classes))))
    raise DataError(
        f"{where}.label: column {column!r} has {len(found)} classes, but model.num_classes is "
        f"{num_classes}; make them equal, or leave model.num_classes out (the classes are "
        f"{found.shown})"
    )


def _list_present(stored: StoredLabels, kind: Kind, way_out: str) -> Classes:
    """List the classes that rows bear, where nothing else declares them."""
    values = stored.values
    for place, value in enumerate(_different(values) if kind == "number" else ()):
        if not is_mark(value) and spelling(value) is None:
            row = values.first(place) if isinstance(values, CodedValues) else place
            raise DataError(
                stored.refusal(row, ", which is no whole number, and labels are classes", way_out)
            )
    present, note = distinct(values), None
    if kind in ("integer", "number") and -1 in present:
        others = present - {-1}
        if len(others) != 1 and min(others, default=0) >= 0:
            present = others
        elif len(others) == 1 and min(others) >= 0:
            (other,) = others
            note = (
                f"note: {stored.where}: -1 and {spelling(other)} are the only labels, so -1 is "
                "taken for a class; a row without a label has null there"
            )
    names = dict.fromkeys(str(spelling(value)) for value in sorted(present))
    if kind in ("text", "bytes") and "-1" in names:
        rest = [name for name in names if name != "-1"]
        if rest and not any(map(_is_whole, rest)):
            del names["-1"]
        elif rest:
            note = (
                f"note: {stored.where}: the labels are texts, and '-1' is taken for a class as "
                f"{rest[0]!r} is; a row without a label has null or an empty text there"
            )
    return Classes(tuple(names), kind, str(stored.feature), note)


def distinct(values: Iterable[Any]) -> set[Any]:
    """The labels that there are, without null, NaN and empty texts."""
    return {value for value in _different(values) if not is_mark(value)}


def _different(values: Iterable[Any]) -> Iterable[Any]:
    """The values, each once where they are coded."""
    return values.values if isinstance(values, CodedValues) else values


def marked(values: Sequence[Any], minus_one: bool) -> BoolArray:
    """Which rows have no label, bool [rows]."""
    if isinstance(values, CodedValues):
        return values.each(lambda value: is_mark(value, minus_one), bool)
    return np.fromiter((is_mark(value, minus_one) for value in values), bool, len(values))


def number_labels(stored: StoredLabels, classes: Classes) -> Int64Array:
    """Each row's class number; -1 where it has no label, or one that is none of the classes."""
    numbers, _ = _match(stored, classes)
    values = stored.values
    if isinstance(values, CodedValues):
        return values.each(lambda value: numbers.get(value, -1), np.int64)
    return np.fromiter((numbers.get(value, -1) for value in values), np.int64, len(values))


def _match(stored: StoredLabels, classes: Classes) -> tuple[dict[Any, int], bool]:
    """The class of every label that there is, and whether a ClassLabel's integers told."""
    index, feature, present = classes.index, stored.feature, _labels_in(stored, classes)
    named = isinstance(feature, datasets.ClassLabel)

    def matched(spelled: Callable[[Any], str | None]) -> dict[Any, int]:
        texts = ((value, spelled(value)) for value in present)
        return {value: index[text] for value, text in texts if text in index}

    found = matched(lambda value: _name_of(feature, value) if named else spelling(value))
    whole = all(isinstance(value, (int, float, Decimal)) for value in present)
    if found or named == classes.declared or not present or not whole:
        return found, False
    # A ClassLabel stores integers; where no name tells, a column of integers means those.
    if named:
        return matched(spelling), True
    return {value: int(value) for value in present if 0 <= value < len(classes)}, True


def _labels_in(stored: StoredLabels, classes: Classes) -> set[Any]:
    """The labels that there are, without marks of rows that have none."""
    minus_one = classes.minus_one
    return {value for value in distinct(stored.values) if not is_mark(value, minus_one)}


def check_match(stored: StoredLabels, classes: Classes) -> list[str]:
    """Hold another set's labels to the classes of the labelled split, whatever their type.

    Gives what a person should know of it. Raises DataError where no label of another type is one of
    the classes.
    """
    kind = label_kind(stored.feature, stored.where, stored.column)
    if kind == classes.kind and (kind == "class" or str(stored.feature) == classes.stored):
        return []
    found, by_integer = _match(stored, classes)
    here = "a ClassLabel" if kind == "class" else str(stored.feature)
    present = sorted(_labels_in(stored, classes))
    if not found and present:
        shown = shortened([str(_label(stored.feature, value)) for value in present])
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {here} ({shown}), the labels of "
            f"data.labeled are {classes.stored} ({classes.shown}), and no class is in both; write "
            "them alike"
        )
    begin = f"note: {stored.where}: the labels are {here}, those of data.labeled {classes.stored}: "
    if kind == classes.kind:
        return []
    if by_integer:
        pairs = [f"{int(value)} is {classes.names[at]!r}" for value, at in sorted(found.items())]
        return [f"{begin}matched by the integers that a ClassLabel stores ({shortened(pairs)})"]
    if _EQUIVALENT.get(kind, kind) == _EQUIVALENT.get(classes.kind, classes.kind):
        return []
    return [f"{begin}matched by how they are written"]


def _name_of(feature: Any, value: Any) -> str | None:
    """The name that a ClassLabel gives to an integer."""
    return str(feature.names[value]) if 0 <= value < len(feature.names) else None


def _label(feature: Any, value: Any) -> Any:
    """A label as a person knows it: of a ClassLabel its name."""
    named = isinstance(feature, datasets.ClassLabel) and isinstance(value, int)
    return (_name_of(feature, value) or value) if named else value


def _shown_label(feature: Any, value: Any) -> str:
    shown = repr(_label(feature, value))
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _is_whole(name: str) -> bool:
    return name.lstrip("-").isdecimal()


def _is_negative(name: str) -> bool:
    return name.startswith("-") and _is_whole(name)
