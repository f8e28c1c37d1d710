"""Which kind of input a set holds, and in which columns, where the config does not say.

    found = find_input(table, "label", "data.labeled", takes={"table"})
    found.kind, found.column  # "table", ("age", "city")

A column of images or sound is the input wherever there is one. Otherwise it is what both the
columns and the model allow: one column of text, or all of numbers and categories, as a table. Where
that leaves several, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from hpdist.data.decode.encoded import stored_bytes
from hpdist.data.decode.stored_values import Column, stored_values
from hpdist.data.files.named_files import USUAL_LIMITS
from hpdist.data.kinds.base import (
    FoundInput,
    InputKind,
    Rank,
    Recognised,
)
from hpdist.data.kinds.columns import is_bytes
from hpdist.data.kinds.image import IMAGE
from hpdist.data.kinds.registry import kind_named, kinds
from hpdist.data.kinds.table import TABLE
from hpdist.errors import ConfigError, DataError

DEFAULT_KIND: InputKind = IMAGE
"""The kind of rows whose views and columns tell none: pixels and numbers."""

_Candidates = dict[str, list[tuple[InputKind, Recognised]]]  # what the kinds see in each column


def find_input(table: Any, label: str, where: str, takes: Set[str]) -> FoundInput:
    """Find what a labelled set holds, given its column of labels and what the model takes.

    Raises DataError that lists the candidates where several columns fit, or none.
    """
    columns = {
        name: _candidates_in(table, name, feature)
        for name, feature in table.features.items()
        if name != label
    }
    certain, alone, single, joined = (_of_rank(columns, rank) for rank in _RANKS)
    if len(certain) == 1:
        return _one(certain[0], columns)
    if certain:
        raise _ambiguous(where, columns, certain)
    if alone:
        if len(alone) > 1 or single or joined:
            raise _ambiguous(where, columns, list(columns))
        return _one(alone[0], columns)
    if not single and not joined:
        raise DataError(
            f"{where}.input: no column can be what the model sees: {_listed(columns)}; besides the "
            f"label, {label!r}, there must be images, sound, text or numbers"
        )
    takes_single = any(columns[name][0][0].name in takes for name in single)
    takes_joined = TABLE.name in takes
    if not single or (takes_joined and not takes_single):
        of_table = [
            name for name, candidates in columns.items() if any(k is TABLE for k, _ in candidates)
        ]
        return TABLE.join(table, of_table, _held(columns), where)
    if len(single) == 1 and (not joined or not takes_joined):
        return _one(single[0], columns)
    raise _ambiguous(where, columns, [*single, *joined])


def kind_of_input(table: Any, column: Column) -> str | None:
    """Tell what the columns hold that a config names; None where that is no kind of input."""
    if not isinstance(column, str):
        return TABLE.name
    if column not in table.features:
        return None
    candidates = _candidates_in(table, column, table.features[column])
    return candidates[0][0].name if candidates and candidates[0][1].rank != "joined" else None


def kind_of_type(features: Any, column: Column | None) -> InputKind:
    """Give the kind that the type of a column alone tells; pixels or numbers where it tells none.

    A table's rows are not looked at.
    """
    if isinstance(column, str) and column in features:
        for kind, recognised in _by_type(features[column]):
            if recognised.rank != "joined":
                return kind
    return DEFAULT_KIND


def only_certain(features: Any) -> str | None:
    """Name the only column whose type says that it is the input; None of none, or several."""
    columns = {name: _by_type(feature) for name, feature in features.items()}
    found = _of_rank(columns, "certain")
    return found[0] if len(found) == 1 else None


def kind_of_views(views: Any) -> InputKind | None:
    """Give the kind that the views' settings name; None of those that take several.

    Raises ConfigError where there is none of that name, or it needs settings that others have.
    """
    name = getattr(views, "input_kind", None)
    if name is None:
        return None
    kind = kind_named(name)
    if kind.needs_own_views and "input_kind" in type(views).model_fields:
        raise ConfigError(
            f"views.input_kind: {name}: such rows are decoded by settings of their own views; set "
            f"views.name: {kind.name}"
        )
    return kind


def usable_kind(name: str | None) -> InputKind:
    """Give the kind of rows whose views name none: that of the column, if its rows need no others.

    Else it is that of pixels and numbers, which says what is wrong with the column.
    """
    kind = DEFAULT_KIND if name is None else kind_named(name)
    return DEFAULT_KIND if kind.needs_own_views else kind


_RANKS: tuple[Rank, ...] = ("certain", "alone", "single", "joined")


def _candidates_in(table: Any, name: str, feature: Any) -> list[tuple[InputKind, Recognised]]:
    """What the kinds see in a column, the surest first."""
    if not is_bytes(feature):
        return _by_type(feature)
    kind = _kind_of_bytes(table, name)
    return [(kind, Recognised("certain", kind.held))]


def _by_type(feature: Any) -> list[tuple[InputKind, Recognised]]:
    candidates = [
        (kind, found) for kind in kinds() if (found := kind.recognise(feature)) is not None
    ]
    return sorted(candidates, key=lambda one: _RANKS.index(one[1].rank))


def _kind_of_bytes(table: Any, name: str) -> InputKind:
    """Tell the kind of bytes by the first row; what is of none may be images."""
    first = table.select_columns([name]).with_format("arrow")[:1].column(name)
    try:
        data = stored_bytes(stored_values(first)[0], "bytes", USUAL_LIMITS)
    except (ValueError, OSError):  # whoever decodes the row says better what is wrong with it
        return IMAGE
    return next((kind for kind in kinds() if kind.begins_like(data)), IMAGE)


def _of_rank(columns: _Candidates, rank: Rank) -> list[str]:
    """Name the columns of which the surest that is seen in them has a rank."""
    return [
        name for name, candidates in columns.items() if candidates and candidates[0][1].rank == rank
    ]


def _one(column: str, columns: _Candidates) -> FoundInput:
    kind, recognised = columns[column][0]
    line = f"input: {kind.name}, the column {column!r} ({recognised.held}) of data.labeled"
    return FoundInput(kind.name, column, (line,))


def _held(columns: _Candidates) -> Mapping[str, str | None]:
    return {
        name: candidates[0][1].held if candidates else None for name, candidates in columns.items()
    }


def _listed(columns: _Candidates) -> str:
    held = _held(columns)
    return ", ".join(f"{name} ({what or 'of another kind'})" for name, what in held.items())


def _ambiguous(where: str, columns: _Candidates, names: Sequence[str]) -> DataError:
    candidates = _listed({name: columns[name] for name in names})
    return DataError(
        f"{where}.input: several columns can be what the model sees; name one, or a list of those "
        f"of a table; candidates: {candidates}"
    )
