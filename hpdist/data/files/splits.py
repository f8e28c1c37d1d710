"""Splits of tables that are at hand: `train`, `train+test`, `train[:10%]`, `all`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets

from hpdist.errors import DataError

ALL = "all"


def spelled_out(split: str, available: Iterable[str]) -> str:
    """Write `all` as the sum of all splits, in their order."""
    names = list(available)
    return "+".join(names) if split == ALL and ALL not in names else split


def names_in(split: str) -> list[str]:
    """The splits that a specification such as `train[:90%]+test` names, each once."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def check_known(split: str, available: Iterable[str], where: str) -> None:
    """Raise DataError for a split that there is not."""
    known = list(available)
    for name in names_in(split):
        if name not in known:
            raise DataError(
                f'{where}.split: Unknown split "{name}". Should be one of {", ".join(known)}.'
            )


def sliced(tables: Mapping[str, Any], split: str, where: str) -> Any:
    """Take the rows that a specification names, of tables by split. Raises DataError."""
    split = spelled_out(split, tables)
    check_known(split, tables, where)
    lengths = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{where}.split: {split!r} cannot be read: {error}") from error
    pieces = []
    for part in parts:
        table, stop = tables[part.splitname], part.to
        start, stop = part.from_ or 0, lengths[part.splitname] if stop is None else stop
        whole = (start, stop) == (0, len(table))
        pieces.append(table if whole else table.select(range(start, stop)))
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)
