"""Rows to predict, however they are given: a path, a table, or the inputs themselves."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from hpdist.config.section import Section
from hpdist.data.config import Loading, Source, UnlabeledSource
from hpdist.data.decode.stored_values import Column, names_of
from hpdist.data.kinds import InputKind
from hpdist.data.sources.in_memory import IN_MEMORY, table_of
from hpdist.data.sources.labeled import TableRows
from hpdist.data.sources.loading import open_table, same_column
from hpdist.data.sources.parquet_table import rows_of
from hpdist.errors import ConfigError

Values = tuple[list[Any], list[int], str, Callable[[int], str]]
"""Stored values, their ids, the name of the set and what names a row, for messages."""

_NAME = "data"


def value_batches(data: Any, kind: InputKind, column: Column, batch: int) -> Iterator[Values]:
    """Iterate over the stored values of all rows, at most so many at once.

    Raises DataError or ConfigError where the rows cannot be opened.
    """
    values = inputs_given(data)
    if values is None:
        yield from _of_table(open_rows(data, kind, column), batch)
        return
    for start in range(0, len(values), batch):
        part = values[start : start + batch]
        yield list(part), list(range(start, start + len(part))), _NAME, "row {}".format


def inputs_given(data: Any) -> Sequence[Any] | None:
    """Give the stored values where the inputs themselves are given; None of rows and names."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        return list(data)
    if isinstance(data, (list, tuple)) and not any(isinstance(one, Mapping) for one in data):
        return [_stored(one) for one in data]
    return None


def _stored(value: Any) -> Any:
    """Give a value as a column would hold it: a picture encoded, numbers as an array."""
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value):
        return np.asarray(value)
    return value


SectionT = TypeVar("SectionT", bound=Source)


def source_of(data: Any, where: str, section: type[SectionT]) -> tuple[SectionT, Any]:
    """Give the settings of a set, and the data set itself where one is given.

    `data` is a path, settings, a pair of rows and settings, or rows in memory. Raises ConfigError.
    """
    columns: Mapping[str, Any] = {}
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping):
        data, columns = data
    held = None
    if isinstance(data, (str, os.PathLike)):
        values = {"path": os.fspath(data), **columns}
    elif isinstance(data, Section):
        values = data.model_dump(exclude_unset=True) | dict(columns)
    elif isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        values = {**data, **columns}
    else:
        held = table_of(where, data)
        values = {"path": IN_MEMORY, **columns}
    try:
        return section.model_validate(values), held
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, (where, *detail['loc'])))}: {detail['msg']}"
            for detail in error.errors()
        )
        raise ConfigError(found) from None


def open_rows(
    data: Any, kind: InputKind, column: Column, where: str = _NAME, loading: Loading | None = None
) -> TableRows:
    """Open all rows of a set, whether they have labels or not."""
    config, held = source_of(data, where, UnlabeledSource)
    several = not (config.input or isinstance(column, str))
    needed = names_of(column) if several else ()
    table, name, rule = open_table(config, held, where, needed, loading, in_place=True)
    features = table.features
    found = config.input or same_column(column, features)
    chosen = kind.find_columns(features, found, where)
    ids = np.arange(len(table), dtype=np.int64)
    view, _ = rows_of(table, names_of(chosen), ids, where, chosen=False)
    return TableRows(view, chosen, name, ids, rule=rule)


def _of_table(rows: TableRows, batch: int) -> Iterator[Values]:
    for start in range(0, len(rows), batch):
        positions = np.arange(start, min(start + batch, len(rows)))
        yield rows.read(positions), rows.ids[positions].tolist(), rows.name, rows.describe
