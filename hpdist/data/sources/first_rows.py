"""Whether a set of unlabelled rows can be decoded as the labelled ones are, by its first rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpdist.data.decode.encoded import Unreadable
from hpdist.data.decode.spec import InputSpec
from hpdist.data.stream.functions import RowFunctions
from hpdist.data.stream.parquet import ParquetReader
from hpdist.errors import DataError

TRIED = 64  # rows of which one must fit
_PLACES = 8  # that they are taken from, where those of the first do not


def check_parquet_fit(
    reader: ParquetReader, functions: RowFunctions, spec: InputSpec, name: str
) -> None:
    """Do as `check_fit` does, in several places: the first row group read may be damaged."""
    count = min(TRIED, reader.rows)
    places = min(_PLACES, reader.rows // count)
    for place in range(places):
        tried = reader.read(reader.rows * place // places, count, 0, count)
        found = functions.values(tried.table).values
        for line, reason in tried.unread.items():
            found[line] = Unreadable(reason)
        ids = tried.ids.tolist()
        try:
            check_fit(found, spec, name, partial(_describe, reader, ids))
        except DataError:
            if place == places - 1:
                raise
            continue
        return


def _describe(reader: ParquetReader, ids: list[int], line: int) -> str:
    return reader.describe(ids[line])


def check_fit(
    values: list[Any], spec: InputSpec, name: str, describe: Callable[[int], str]
) -> None:
    """Raise DataError unless one of the first rows can be decoded; `describe` names a line's."""
    reasons = []
    for line, value in enumerate(values):
        try:
            spec.decode(value)
        except Exception as error:  # image libraries raise nearly everything on a damaged file
            reasons.append((line, " ".join(str(error).split())))
            continue
        return
    line, reason = reasons[0]
    first = f"{describe(line)} cannot be decoded: {reason}"
    more = f", nor can any other of the first {len(values)}" if len(values) > 1 else ""
    raise DataError(f"{name}: {first}{more}; mend or remove these rows")
