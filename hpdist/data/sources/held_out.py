"""Every row of a labelled set exactly once, sharded over the ranks in batches of one size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdist.data.batch import BadRow, LabeledBatch
from hpdist.data.decode.encoded import Unreadable, is_elsewhere
from hpdist.data.decode.spec import InputSpec
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.stream.permute import Int64Array
from hpdist.data.structures import Structure, from_arrays, take_rows
from hpdist.errors import DataError

_LOOK_SECONDS = 5.0  # that the start of a run looks for unreadable rows, on each rank
_LOOK_ROWS = 64  # read at once then
_NAMED = 10  # rows that an error names
MOST_LABELED = 10_000
"""Labelled rows that each rank looks at before the training."""


def evaluation_batches(
    rows: LabeledRows,
    spec: InputSpec,
    batch: int,
    rank: int,
    world_size: int,
    report: Callable[[BadRow], None] = lambda row: None,
) -> Iterator[tuple[LabeledBatch, Tensor]]:
    """Iterate over this rank's rows, with `valid`, a bool tensor [batch], beside each batch.

    Every rank gets the same number of batches of the same size, at most `batch` rows, so that
    collectives in the model's forward match. The ragged end repeats row 0 with valid=False; over
    all ranks, every row that can be read stands exactly once with valid=True. One that cannot is
    zeros with valid=False, and `report` is given it.
    """
    start, end, share = _share(len(rows), rank, world_size)
    size = min(batch, share)
    for first in range(start, start + share, size):
        positions = np.arange(first, first + size)
        valid = positions < end
        positions[~valid] = 0
        ids, labels = rows.ids[positions], take_rows(rows.labels, positions)
        inputs: Any = spec.empty(size)
        for line, row in _decode(rows, spec, positions, inputs).items():
            if valid[line]:
                report(row)
            valid[line] = False
        yield (
            LabeledBatch(inputs, from_arrays(labels), torch.from_numpy(ids)),
            torch.from_numpy(valid),
        )


@dataclass(frozen=True)
class Look:
    """What one rank has found out about its share of a set before the training."""

    looked_at: int
    """Rows that it has looked at."""
    bad: tuple[BadRow, ...]
    """The first of those of them that cannot be read."""
    bad_rows: int
    """How many these are."""


def look_through(
    rows: LabeledRows,
    spec: InputSpec,
    rank: int = 0,
    world_size: int = 1,
    seconds: float = _LOOK_SECONDS,
    most: int | None = None,
) -> Look:
    """Decode this rank's rows of a labelled set, as far as the time allows.

    Rows that lie elsewhere are not fetched for it, but for the first one; no more than `most` are
    decoded.
    """
    start, end, _ = _share(len(rows), rank, world_size)
    end = end if most is None else min(end, start + most)
    began, looked_at, bad = time.monotonic(), 0, list[BadRow]()
    size = 1  # the first row tells how a set differs from the training rows
    while start < end and (not looked_at or time.monotonic() - began < seconds):
        positions = np.arange(start, min(start + size, end))
        if looked_at and any(is_elsewhere(value) for value in _read(rows, positions)):
            break
        out = spec.empty(len(positions))
        bad += _decode(rows, spec, positions, out).values()
        looked_at, start, size = looked_at + len(positions), start + len(positions), _LOOK_ROWS
    return Look(looked_at, tuple(bad[:_NAMED]), len(bad))


def summarize_looks(name: str, count: int, looks: Sequence[Look]) -> str | None:
    """What to say of a set of so many rows; None where all is well."""
    looked_at = sum(look.looked_at for look in looks)
    bad = [row for look in looks for row in look.bad]
    parts = []
    if bad:
        bad_rows = sum(look.bad_rows for look in looks)
        parts.append(
            f"{bad_rows} of {looked_at} rows cannot be decoded and are left out of every score, "
            f"such as {bad[0]}"
        )
    if looked_at < count:
        parts.append(f"{count - looked_at} of {count} rows were not looked at before the training")
    return f"{name}: {'; '.join(parts)}" if parts else None


def refuse_unreadable(rows: LabeledRows, looks: Sequence[Look]) -> str | None:
    """What to say of labelled training rows that were looked at; None where all were, and are well.

    Raises DataError that names those that cannot be decoded, with the class of each.
    """
    bad = [row for look in looks for row in look.bad]
    if bad:
        bad_rows = sum(look.bad_rows for look in looks)
        count = f"{bad_rows} labelled rows" if bad_rows > 1 else "a labelled row"
        lines = [f"{row.where}{_class_of(rows, row.id)}: {row.reason}" for row in bad[:_NAMED]]
        more = f"; and {bad_rows - _NAMED} more" if bad_rows > _NAMED else ""
        raise DataError(
            f"{rows.name}: {count} cannot be decoded: {'; '.join(lines)}{more}; mend them, or "
            "leave them out of the set"
        )
    looked_at = sum(look.looked_at for look in looks)
    if looked_at == len(rows):
        return None
    return (
        f"{rows.name}: {len(rows) - looked_at} of {len(rows)} rows were not looked at before the "
        "training"
    )


def _class_of(rows: LabeledRows, row: int) -> str:
    """The class of a row of the split, for messages; of other labels nothing."""
    if rows.class_numbers is None:
        return ""
    number = rows.class_numbers[int(np.searchsorted(rows.ids, row))]
    return f" of class {rows.classes.names[int(number)]!r}"


def _share(count: int, rank: int, world_size: int) -> tuple[int, int, int]:
    """Where a rank's rows begin and end, and how many a rank has, rounded up."""
    share = -(-count // world_size)
    start = rank * share
    return start, min(start + share, count), share


def _decode(
    rows: LabeledRows, spec: InputSpec, positions: Int64Array, out: Structure
) -> dict[int, BadRow]:
    """Decode rows into the lines of `out`; those that cannot be, by line."""
    values = _read(rows, positions)
    reasons = spec.decode_valid(values, out)
    ids = rows.ids[positions].tolist()
    return {
        line: BadRow(ids[line], rows.describe(ids[line]), reason)
        for line, reason in reasons.items()
    }


def _read(rows: LabeledRows, positions: Int64Array) -> list[Any]:
    try:
        return rows.read(positions)
    except DataError:  # one of them, or a file that holds several
        return [_read_one(rows, position) for position in positions]


def _read_one(rows: LabeledRows, position: int) -> Any:
    try:
        (value,) = rows.read(np.array([position]))
    except DataError as error:
        return Unreadable(str(error))
    return value
