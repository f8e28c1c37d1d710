"""The training rows, once and decoded: what views are fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hpdist.data.decode.arrays import Arrays, slice_rows
from hpdist.data.decode.spec import InputSpec, arrays_of
from hpdist.data.files.row_names import describe_rows
from hpdist.data.sources.labeled import LabeledRows, UnlabeledTable
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled, MixedRows
from hpdist.errors import DataError, one_line

_AT_ONCE = 1024  # rows


def training_rows(
    labeled: LabeledRows, unlabeled: AnyUnlabeled | None, spec: InputSpec
) -> Iterator[Arrays]:
    """The labelled rows that are used, and the unlabelled ones of tables; streams are not read.

    Gives the arrays of some rows at a time. Raises DataError for a labelled row that cannot be
    decoded; unlabelled ones, and those that a filter leaves out, are passed over.
    """
    for at in range(0, len(labeled), _AT_ONCE):
        places = np.arange(at, min(at + _AT_ONCE, len(labeled)))
        ids = labeled.ids[places].tolist()
        values = labeled.read(places)
        yield arrays_of(spec.decode_rows(values, ids, labeled.name, labeled.describe))
    parts: Any = unlabeled.parts if isinstance(unlabeled, MixedRows) else [unlabeled]
    for part in parts:
        if isinstance(part, UnlabeledTable):
            yield from _usable(part, spec)


def _usable(rows: UnlabeledTable, spec: InputSpec) -> Iterator[Arrays]:
    for at in range(0, len(rows), _AT_ONCE):
        ids = rows.ids[at : at + _AT_ONCE].tolist()
        try:
            found = rows.functions.values(rows.dataset[ids])
        except OSError as error:
            raise DataError(
                f"{rows.name}: cannot read {describe_rows(rows.dataset, ids)}: {one_line(error)}"
            ) from error
        out = arrays_of(spec.empty(len(ids)))
        unusable = [*spec.decode_into(found.values, out), *found.left_out]
        used = np.setdiff1d(np.arange(len(ids)), unusable)
        yield slice_rows(out, used)
