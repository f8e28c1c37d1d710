"""Opens files of this machine with `datasets`, as tables or streams.

What `datasets` refuses, and people have, is put right here: files of one set with other columns,
other types and other orders of them, files without rows, folders that name columns, and folders of
sound without torchcodec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pandas  # type: ignore[import-untyped]
from datasets.packaged_modules.csv.csv import CsvConfig

from hpdist.data.files.columns import common
from hpdist.data.files.row_names import remember_files
from hpdist.data.files.splits import check_known, names_in, sliced, spelled_out
from hpdist.data.sources.builders import OptionalKeys, RawAudioFolder, listed
from hpdist.data.sources.local_files import FOLDERS, LocalFiles
from hpdist.data.sources.local_parquet import open_parquet
from hpdist.data.sources.opening import Opening
from hpdist.data.sources.options import dialect_hint
from hpdist.errors import DataError

_PEEKED = 1000  # rows of a CSV file that tell the types of its columns


def open_files(
    files: LocalFiles,
    split: str,
    options: Mapping[str, Any],
    *,
    streaming: bool,
    needed: Sequence[str],
    name: str,
    where: str,
    copied: Callable[[], Any] | None = None,
) -> Any:
    """Open files as a `datasets.Dataset`, or with `streaming` as an `IterableDataset`.

    `needed` are columns that must be in all of them. Where `copied` is given, Parquet is opened as
    a `ParquetTable` if it can be, which calls that if it needs the `Dataset` after all. Raises
    DataError where columns are missing, or types do not go together; and what `datasets` raises.
    """
    split = spelled_out(split, files.splits)
    check_known(split, files.splits, where)
    opening = Opening(
        files.builder,
        files.base,
        {part: files.splits[part] for part in names_in(split)},
        split,
        {**files.options, **options},
        streaming,
        needed,
        name,
        where,
        copied,
    )
    open_with = _OPENERS.get(files.builder, _open_plain)
    if not streaming or "+" not in split:
        return open_with(opening)
    parts = [
        open_with(replace(opening, split=part, splits={key: opening.splits[key]}))
        for part in split.split("+")
        for key in names_in(part)
    ]
    return datasets.concatenate_datasets(parts)


def _open_plain(opening: Opening) -> Any:
    """Open files of any other kind; where they go wrong together, one by one."""
    try:
        return opening.load()
    except datasets.exceptions.DatasetGenerationError as error:
        if opening.streaming or opening.builder in FOLDERS:
            raise
        if len(opening.paths) == 1:
            raise _unreadable(opening, opening.paths[0], error) from error
    except Exception:
        if opening.streaming or len(opening.paths) == 1 or opening.builder in FOLDERS:
            raise
    return _open_one_by_one(opening)


def _open_json(opening: Opening) -> Any:
    """Open JSON. Its keys are optional, so that a file may lack one, and rows of it have null."""
    return opening.build(OptionalKeys) if opening.streaming else _open_plain(opening)


def _open_csv(opening: Opening) -> Any:
    """Open CSV files; where their columns differ, each by itself or in types settled for all."""
    paths = opening.paths
    if len(paths) == 1 or opening.options.get("skipfooter"):  # which pandas counts from the end
        return _open_plain(opening)
    peek = _first_rows if opening.streaming else _header
    columns = common({path: _peeked(opening, path, peek) for path in paths}, opening.name)
    columns.require(opening.needed, opening.where)
    if opening.streaming:
        settled = {"features": _settled(columns.features)} if columns.differ else {}
        return opening.load(**settled)
    return _open_one_by_one(opening) if columns.differ else _open_plain(opening)


def _open_audio(opening: Opening) -> Any:
    opened = opening.build(RawAudioFolder)
    for column, feature in dict(opened.features).items():
        if isinstance(feature, datasets.Image):
            opened = opened.cast_column(column, datasets.Audio(decode=False))
    return opened


def _peeked(opening: Opening, path: str, peek: Any) -> Any:
    """The features that a look into a CSV file tells."""
    try:
        return peek(path, opening.options)
    except Exception as error:  # pandas has many
        raise _unreadable(opening, path, error) from error


def _header(path: str, options: Mapping[str, Any]) -> Any:
    """The columns of a CSV file, of no type yet."""
    given = {**CsvConfig(**options).pd_read_csv_kwargs, "nrows": 0, "chunksize": None}
    with fsspec.open(path, "rb", compression="infer") as file:
        names = [str(name) for name in pandas.read_csv(file, **given).columns]
    return datasets.Features(dict.fromkeys(names, datasets.Value("null")))


def _first_rows(path: str, options: Mapping[str, Any]) -> Any:
    """The columns of a CSV file, in the types of its first rows."""
    stream = datasets.load_dataset(
        "csv",
        data_files=listed({"train": [path]}),
        split="train",
        streaming=True,
        **{**options, "chunksize": _PEEKED},
    )
    first = next(iter(stream.with_format("arrow").iter(batch_size=_PEEKED)))
    return datasets.Features.from_arrow_schema(first.schema)


def _settled(features: Any) -> Any:
    """Types that pandas can be told before it reads: text for a column of nulls so far."""
    text = ("null", "large_string")
    return datasets.Features(
        {
            name: datasets.Value("string") if getattr(one, "dtype", "") in text else one
            for name, one in features.items()
        }
    )


def _open_one_by_one(opening: Opening) -> Any:
    """Open each file by itself, and join what all of them have: they are not alike."""
    tables = {path: _open_alone(opening, path) for path in opening.paths}
    full = {path: table for path, table in tables.items() if len(table)}
    if not full:
        raise opening.no_rows()
    columns = common({path: table.features for path, table in full.items()}, opening.name)
    columns.require(opening.needed, opening.where)
    names = list(columns.features)
    opened_alone = {
        path: table.select_columns(names).cast(columns.features) for path, table in full.items()
    }
    empty = next(iter(opened_alone.values())).select([])
    joined = {
        part: datasets.concatenate_datasets(
            [opened_alone[p] for p in paths if p in opened_alone] or [empty]
        )
        for part, paths in opening.splits.items()
    }
    opened = sliced(joined, opening.split, opening.where)
    if "[" not in opening.split:
        rows = [(path, len(opened_alone[path])) for path in opening.paths if path in opened_alone]
        remember_files(opened, rows)
    return opened


def _open_alone(opening: Opening, path: str) -> Any:
    """Open one file as a table. Raises DataError that names it."""
    try:
        return replace(opening, splits={"train": [path]}, split="train").load()
    except Exception as error:  # every builder has its own
        raise _unreadable(opening, path, error) from error


def _unreadable(opening: Opening, path: str, error: Exception) -> DataError:
    given = ", ".join(f"{name}: {value!r}" for name, value in opening.options.items())
    read = f" with options {{{given}}}" if given else ""
    return DataError(
        f"{opening.name}: {path} cannot be read{read}: {_innermost(error)}{dialect_hint(error)}; "
        "mend the file, or leave it out of data_files"
    )


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


_OPENERS = {
    "audiofolder": _open_audio,
    "csv": _open_csv,
    "json": _open_json,
    "parquet": open_parquet,
}
