"""The `options` of a data set: arguments of the `datasets` builder that reads its files."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from pandas.errors import ParserError  # type: ignore[import-untyped]

from hpdist.errors import ConfigError

_NOT_OPTIONS = (
    *("name", "version", "description", "data_dir", "data_files"),  # settings of their own
    *("features", "converters", "fragment_scan_options"),  # objects, which no text stands for
)
_OF_STREAMED_PARQUET = ("columns",)
_SEPARATORS = (";", "\t", "|")
_INDEX = re.compile(r"__index_level_\d+__")  # what pandas makes of more fields than names
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?(\.\d+)?", re.IGNORECASE)  # also repeated: 1.5.1


def check_options(given: Mapping[str, Any], builder: str, known: type, where: str) -> None:
    """Raise ConfigError for an option that a builder does not have; `known` is its config class."""
    fields = [field.name for field in dataclasses.fields(known)]
    allowed = [name for name in fields if name not in _NOT_OPTIONS]
    for name in given:
        if name in allowed:
            continue
        near = difflib.get_close_matches(name, allowed, 1, 0.7)
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
    """Say which option reads a file that is no UTF-8, or in another dialect; else nothing."""
    while error.__cause__ is not None and not isinstance(error, UnicodeDecodeError):
        error = error.__cause__
    if isinstance(error, ParserError) and "Expected" in str(error):
        return (
            "; where its columns are not separated by commas, set options: {sep: …}; lines that "
            "are broken are left out by options: {on_bad_lines: skip}"
        )
    if not isinstance(error, UnicodeDecodeError):
        return ""
    if error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "; the file is not in UTF-8: set options: {encoding: utf-16}"
    return (
        "; the file is not in UTF-8: set options: {encoding: …} to what it is in, such as cp1252 "
        "(Western Europe, or latin-1), cp1250, cp1251, cp932 or gb18030"
    )


def separator_hint(columns: list[str]) -> str | None:
    """Say which option separates the columns of a CSV file that seems to have one alone."""
    named = [name for name in columns if not _INDEX.fullmatch(name)]
    wrong = next((name for name in named if any(sep in name for sep in _SEPARATORS)), None)
    if wrong is not None and (len(named) == 1 or len(named) < len(columns)):
        sep = max(_SEPARATORS, key=wrong.count)
        shown = '"\\t"' if sep == "\t" else f'"{sep}"'
        return (
            f"there is one column, {wrong!r}, since columns are separated by commas unless options "
            f"say otherwise; set options: {{sep: {shown}}}"
        )
    return None


def header_hint(columns: list[str]) -> str | None:
    """Say which option reads a CSV file that lacks a column, by the names of those it has."""
    named = [name for name in columns if not _INDEX.fullmatch(name)]
    if named and named[0].startswith("#"):
        return (
            f"the first column is called {named[0]!r}; where that line is a comment, set options: "
            '{comment: "#"}'
        )
    if any(_NUMBER.fullmatch(name) for name in named):
        return (
            f"the columns are called {', '.join(named[:6])}, which seems to be a row; where the "
            "file has no line of names, set options: {names: […]}"
        )
    spaced = next((name for name in named if name != name.strip()), None)
    if spaced is not None:
        return (
            f"there is a column {spaced!r}, with spaces around its name; for spaces behind commas "
            "set options: {skipinitialspace: true}, or write the name so, in quotes"
        )
    return None
