"""The `options` of a data set: arguments of the `datasets` builder that reads its files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hpdist.errors import ConfigError

_NOT_OPTIONS = (
    *("name", "version", "description", "data_dir", "data_files"),  # settings of their own
    *("features", "converters", "fragment_scan_options"),  # objects, which no text stands for
)
_OF_STREAMED_PARQUET = ("columns",)


def check_options(given: Mapping[str, Any], builder: str, known: type, where: str) -> None:
    """Raise ConfigError for an option that a builder does not have; `known` is its config class."""
    fields = [field.name for field in dataclasses.fields(known)]
    allowed = [name for name in fields if name not in _NOT_OPTIONS]
    for name in given:
        if name in allowed:
            continue
        near = difflib.get_close_matches(name, allowed, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{where}.options: {builder} has no option {name!r}; {hint}there are "
            f"{', '.join(allowed) or 'none'}"
        )


def check_stream_options(given: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an option that is of no effect on streamed Parquet."""
    for name in given:
        if name not in _OF_STREAMED_PARQUET:
            raise ConfigError(
                f"{where}.options: streamed Parquet has no option {name!r}, only columns; leave it "
                "out, set streaming: false, or use filter"
            )


def dialect_hint(error: BaseException) -> str:
    """Say which option reads a file that is no UTF-8; nothing of any other error."""
    while error.__cause__ is not None and not isinstance(error, UnicodeDecodeError):
        error = error.__cause__
    if not isinstance(error, UnicodeDecodeError):
        return ""
    marked = error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if marked else "latin-1"
    return f"; the file is not in UTF-8: set options: {{encoding: {encoding}}}, or what it is in"


def separator_hint(columns: list[str]) -> str | None:
    """Say which option separates the columns of a CSV file that seems to have one alone."""
    if len(columns) != 1:
        return None
    counts = {sep: columns[0].count(sep) for sep in (";", "\t", "|")}
    sep = max(counts, key=lambda one: counts[one])
    if not counts[sep]:
        return None
    shown = '"\\t"' if sep == "\t" else f'"{sep}"'
    return (
        f"there is one column, {columns[0]!r}, since columns are separated by commas unless "
        f"options say otherwise; set options: {{sep: {shown}}}"
    )
