"""Opens files of this machine with `datasets`, as tables or streams.

What `datasets` refuses, and people have, is put right here: files of one set with other columns,
other types and other orders of them, files without rows, folders that name columns, and folders of
sound without torchcodec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pandas  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.packaged_modules.csv.csv import CsvConfig

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.files.columns import Columns, common
from hpdist.data.files.partitions import Partitions, partitions
from hpdist.data.files.row_names import remember_files
from hpdist.data.files.splits import check_known, names_in, sliced, spelled_out
from hpdist.data.files.unpacked import most_unpacked
from hpdist.data.sources.builders import OptionalKeys, RawAudioFolder, UnlikeParquet, build, listed
from hpdist.data.sources.held import HELD, hold_footer
from hpdist.data.sources.known_types import known_features, unknown_columns
from hpdist.data.sources.local_files import FOLDERS, LocalFiles
from hpdist.data.sources.options import dialect_hint
from hpdist.data.sources.parquet_pieces import Pieces, spans_of
from hpdist.data.sources.parquet_table import ParquetTable
from hpdist.errors import ConfigError, DataError

_FOOTERS_AT_ONCE = 8
_PEEKED = 1000  # rows of a CSV file that tell the types of its columns


@dataclass(frozen=True)
class Opening:
    """What is to be opened, and how messages call it."""

    builder: str
    base: str
    splits: Mapping[str, Sequence[str]]
    split: str
    options: Mapping[str, Any]
    streaming: bool
    needed: Sequence[str]
    """Columns that every file must have."""
    name: str
    where: str
    copied: Callable[[], Any] | None = None
    """Opens the same as a `datasets.Dataset`, if Parquet is to be read where it lies instead."""

    @property
    def paths(self) -> list[str]:
        """All files, split by split."""
        return [path for of_split in self.splits.values() for path in of_split]

    def load(self, **options: Any) -> Any:
        """Open the files with the builder of `datasets`, or what is used in its place."""
        if self.builder in HELD:
            return self.build(HELD[self.builder], **options)
        return datasets.load_dataset(
            self.builder,
            data_files=listed(self.splits),
            split=self.split,
            streaming=self.streaming,
            **{**self.options, **options},
        )

    def build(self, builder: type, **options: Any) -> Any:
        """Open the files with a builder of one's own."""
        return build(
            builder,
            self.builder,
            self.splits,
            self.split,
            self.streaming,
            **{**self.options, **options},
        )

    def no_rows(self) -> DataError:
        """Say that all files are empty."""
        count = len(self.paths)
        empty = f"its {count} files are all" if count > 1 else "its file is"
        return DataError(f"{self.name}: holds no rows; {empty} empty")


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


def _open_parquet(opening: Opening) -> Any:
    found = dict(zip(opening.paths, _footers(opening), strict=True))
    full = {
        part: [path for path in paths if found[path].num_rows]
        for part, paths in opening.splits.items()
    }
    read = [path for paths in full.values() for path in paths]
    if not read:
        raise opening.no_rows()
    full = {part: paths or list(opening.splits[part])[:1] for part, paths in full.items()}
    folders = partitions(read, opening.base)
    columns = _parquet_columns({path: found[path] for path in read}, folders, opening)
    opening = replace(opening, splits=full)
    hollow = any(found[path].row_group(0).num_rows == 0 for path in read)  # `datasets` fails there
    names = opening.options.get("columns") or list(columns.features)
    features = datasets.Features({name: columns.features[name] for name in names})
    if _is_read_in_place(opening, features):
        opened = _in_place(opening, {path: found[path] for path in read}, features, folders)
    elif columns.differ or folders or hollow:
        opened = opening.build(UnlikeParquet, features=features, folders=folders)
    else:
        opened = opening.load()
    if not opening.streaming and "[" not in opening.split and not opening.options.get("filters"):
        remember_files(opened, [(path, found[path].num_rows) for path in opening.paths])
    return opened


def _is_read_in_place(opening: Opening, features: Any) -> bool:
    """Whether rows are read as `datasets` would give them, without its copy."""
    if opening.copied is None or opening.streaming or set(opening.options) - {"columns"}:
        return False
    return not any("." in name for name in features)  # which Parquet takes for a path


def _in_place(
    opening: Opening, found: Mapping[str, pq.FileMetaData], features: Any, folders: Partitions
) -> ParquetTable:
    names = list(features)
    for path, footer in found.items():
        hold_footer(path, footer, names)
    full = {part: [p for p in paths if p in found] for part, paths in opening.splits.items()}
    pieces = Pieces.of(spans_of(opening.split, full, found), found, names)
    assert opening.copied is not None
    return ParquetTable(pieces, features, folders, most_unpacked(), opening.copied)


def _parquet_columns(
    found: Mapping[str, pq.FileMetaData], folders: Partitions, opening: Opening
) -> Columns:
    """The columns that files have in common, with those that folders name."""
    features: dict[str, Any] = {}
    foreign = False
    last: tuple[pa.Schema, Any] | None = None  # most files are as the one before
    for path, footer in found.items():
        schema = footer.schema.to_arrow_schema()
        if last is None or not schema.equals(last[0], check_metadata=True):
            full = folders.added(plain_schema(schema))
            foreign = foreign or bool(unknown_columns(schema))
            for name, kind in unknown_columns(full).items():
                if name in opening.needed:
                    raise DataError(
                        f"{opening.where}: the column {name!r} is {kind} in {path}, which cannot "
                        "be read; write what it holds as lists or columns of their own"
                    )
            last = schema, known_features(full)
        features[path] = last[1]
    columns = common(features, opening.name)
    columns.require(opening.needed, opening.where)
    for name in opening.options.get("columns") or ():
        if name not in columns.features:
            raise ConfigError(
                f"{opening.where}.options: columns: there is no column {name!r}; there are "
                f"{', '.join(columns.features)}"
            )
    return replace(columns, differ=columns.differ or foreign)


def _footers(opening: Opening) -> list[pq.FileMetaData]:
    def footer(path: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{opening.name}: {path} is no Parquet file, or its end is damaged ({cause}); "
                "restore the file, or leave it out of data_files"
            ) from error

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="hpdist-footers") as pool:
        return list(pool.map(footer, opening.paths))


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
    "parquet": _open_parquet,
}
