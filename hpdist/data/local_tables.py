"""Opens files of this machine with `datasets`, as tables or streams.

What `datasets` refuses, and people have, is put right here: files of one set with other columns,
other types and other orders of them, files without rows, folders that name columns, and folders of
sound without torchcodec.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.dataset as pd  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.table import table_cast
from pyarrow.fs import LocalFileSystem  # type: ignore[import-untyped]

from hpdist.data.arrow_types import plain_schema
from hpdist.data.columns import Columns, common
from hpdist.data.local_files import FOLDERS, LocalFiles
from hpdist.data.options import dialect_hint
from hpdist.data.partitions import Partitions, partitions
from hpdist.data.rows import remember_files
from hpdist.data.splits import check_known, names_in, sliced, spelled_out
from hpdist.errors import DataError

_CACHED = "hpdist-1"  # changes when what these builders make of a file does
_FOOTERS_AT_ONCE = 8
_ROWS = 1000  # of a batch, where the file does not say


def open_files(
    files: LocalFiles,
    split: str,
    options: Mapping[str, Any],
    *,
    streaming: bool,
    needed: Sequence[str],
    name: str,
    where: str,
) -> Any:
    """Open files as a `datasets.Dataset`, or with `streaming` as an `IterableDataset`.

    `needed` are columns that must be in all of them. Raises DataError where they are not, or types
    do not go together; and what `datasets` raises.
    """
    split = spelled_out(split, files.splits)
    check_known(split, files.splits, where)
    splits = {part: files.splits[part] for part in names_in(split)}
    options = {**files.options, **options}
    if streaming and "+" in split:
        parts = [
            open_files(
                *(files, part, options),
                streaming=True,
                needed=needed,
                name=name,
                where=where,
            )
            for part in split.split("+")
        ]
        return datasets.concatenate_datasets(parts)
    if files.builder == "parquet":
        return _open_parquet(splits, files.base, split, options, streaming, needed, name, where)
    if files.builder == "audiofolder":
        return _open_sounds(splits, split, options, streaming)
    if streaming and files.builder == "json":
        return _stream_json(splits, split, options)
    differ = False
    if files.builder == "csv":
        columns = _csv_columns(splits, options, name)
        columns.require(needed, where)
        differ = columns.differ
        if differ and streaming:
            options["features"] = _settled(columns.features)
    try:
        if not differ or streaming:
            return datasets.load_dataset(
                files.builder,
                data_files=_listed(splits),
                split=split,
                streaming=streaming,
                **options,
            )
    except Exception:
        alone = sum(map(len, splits.values())) == 1
        if streaming or alone or files.builder in FOLDERS:
            raise
    return _open_one_by_one(files.builder, splits, split, options, needed, name, where)


def config_of(builder: str) -> type:
    """The class whose fields are the options of a builder of `datasets`."""
    known: type = datasets.load.import_main_class(
        f"datasets.packaged_modules.{builder}.{builder}"
    ).BUILDER_CONFIG_CLASS
    return known


def footers(paths: Sequence[str], name: str) -> list[pq.FileMetaData]:
    """Read the footers of local Parquet files. Raises DataError that names the file."""

    def footer(path: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{name}: {path} is no Parquet file, or its end is damaged ({cause}); restore the "
                "file, or leave it out of data_files"
            ) from error

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="hpdist-footers") as pool:
        return list(pool.map(footer, paths))


def _listed(splits: Mapping[str, Sequence[str]]) -> DataFilesDict:
    """The files as `datasets` takes them when it need not look for any, so as they are spelled."""
    return DataFilesDict(
        {
            split: DataFilesList(list(paths), [(str(os.stat(p).st_mtime_ns),) for p in paths])
            for split, paths in splits.items()
        }
    )


def _open_parquet(
    splits: Mapping[str, Sequence[str]],
    base: str,
    split: str,
    options: dict[str, Any],
    streaming: bool,
    needed: Sequence[str],
    name: str,
    where: str,
) -> Any:
    paths = _in_order(splits)
    found = dict(zip(paths, footers(paths, name), strict=True))
    full = {
        part: [path for path in of_split if found[path].num_rows]
        for part, of_split in splits.items()
    }
    read = _in_order(full)
    if not read:
        empty = f"its {len(paths)} files are all" if len(paths) > 1 else "its file is"
        raise DataError(f"{name}: holds no rows; {empty} empty")
    full = {part: of_split or list(splits[part])[:1] for part, of_split in full.items()}
    folders = partitions(read, base)
    columns = common(
        {path: datasets.Features.from_arrow_schema(_schema(found[path], folders)) for path in read},
        name,
    )
    columns.require(needed, where)
    if not columns.differ and not folders:
        opened = datasets.load_dataset(
            "parquet", data_files=_listed(full), split=split, streaming=streaming, **options
        )
    else:
        builder = _Parquet(
            dataset_name="parquet",
            data_files=_listed(full),
            hash=_CACHED,
            features=columns.features,
            folders=folders,
            **options,
        )
        opened = _opened(builder, split, streaming)
    if not streaming and "[" not in split and not options.get("filters"):
        remember_files(opened, [(path, found[path].num_rows) for path in _in_order(full)])
    return opened


def _in_order(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """All files, split by split."""
    return [path for of_split in splits.values() for path in of_split]


def _schema(footer: pq.FileMetaData, folders: Partitions) -> pa.Schema:
    return folders.added(plain_schema(footer.schema.to_arrow_schema()))


@dataclass
class _ParquetConfig(ParquetConfig):  # type: ignore[misc]
    folders: Partitions = field(default_factory=Partitions)


class _Parquet(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Parquet files of which each has the columns asked for, in types that can be cast."""

    BUILDER_CONFIG_CLASS = _ParquetConfig

    def _info(self) -> datasets.DatasetInfo:
        features = self.config.features
        if self.config.columns is not None:
            features = datasets.Features({name: features[name] for name in self.config.columns})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files)})
            for split, files in self.config.data_files.items()
        ]

    def _generate_shards(self, files: Sequence[str]) -> Any:
        yield from files

    def _generate_tables(self, files: Sequence[str]) -> Any:
        config = self.config
        schema = self.info.features.arrow_schema
        for number, path in enumerate(files):
            fragment = pd.ParquetFileFormat().make_fragment(path, LocalFileSystem())
            own = [name for name in schema.names if name in fragment.physical_schema.names]
            groups = fragment.row_groups
            rows = config.batch_size or (groups[0].num_rows if groups else 0) or _ROWS
            kept = pq.filters_to_expression(config.filters) if config.filters else None
            batches = fragment.to_batches(columns=own, batch_size=rows, filter=kept)
            for place, batch in enumerate(batches):
                table = pa.Table.from_batches([batch])
                for column in config.folders.schema:
                    if column.name in schema.names and column.name not in own:
                        values = config.folders.constant(path, column, len(table))
                        table = table.append_column(column, values)
                yield _key(number, place), table_cast(table, schema)


def _key(number: int, place: int) -> Any:
    """A table's key as this version of `datasets` has them."""
    kind = getattr(datasets.builder, "Key", None)
    return f"{number}_{place}" if kind is None else kind(number, place)


def _stream_json(splits: Mapping[str, Sequence[str]], split: str, options: dict[str, Any]) -> Any:
    """Stream JSON. Its keys are optional, so that a file may lack one, and rows of it have null."""
    builder = _Json(dataset_name="json", data_files=_listed(splits), hash=_CACHED, **options)
    return _opened(builder, split, streaming=True)


def _csv_columns(
    splits: Mapping[str, Sequence[str]], options: dict[str, Any], name: str
) -> Columns:
    """What the first rows of CSV files tell of their columns; of a single file nothing."""
    paths = _in_order(splits)
    if len(paths) < 2:
        return Columns(datasets.Features())
    return common({path: _peeked(path, options, name) for path in paths}, name)


def _peeked(path: str, options: Mapping[str, Any], name: str) -> Any:
    """The features of a CSV file's first rows."""
    stream = datasets.load_dataset(
        "csv",
        data_files=_listed({"train": [path]}),
        split="train",
        streaming=True,
        **{**options, "chunksize": _ROWS},
    )
    try:
        first = next(iter(stream.with_format("arrow").iter(batch_size=_ROWS)))
    except Exception as error:  # pandas has many
        raise _unreadable(path, name, error) from error
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


class _Json(Json):  # type: ignore[misc]
    """JSON of which later files may have keys that the first has not."""

    def _cast_table(self, pa_table: pa.Table, *more: Any, **options: Any) -> pa.Table:
        if self.info.features is not None:
            kept = [name for name in pa_table.column_names if name in self.info.features]
            pa_table = pa_table.select(kept)
        return super()._cast_table(pa_table, *more, **options)


class _Sounds(ImageFolder):  # type: ignore[misc]
    """A folder of sound files, undecoded; `AudioFolder` names them with torchcodec alone."""

    BASE_COLUMN_NAME = "audio"
    EXTENSIONS = AudioFolder.EXTENSIONS

    def _base_feature(self) -> Any:
        return datasets.Image(decode=False)


def _open_sounds(
    splits: Mapping[str, Sequence[str]], split: str, options: dict[str, Any], streaming: bool
) -> Any:
    builder = _Sounds(
        dataset_name="audiofolder", data_files=_listed(splits), hash=_CACHED, **options
    )
    opened = _opened(builder, split, streaming)
    for column, feature in dict(opened.features).items():
        if isinstance(feature, datasets.Image):
            opened = opened.cast_column(column, datasets.Audio(decode=False))
    return opened


def _opened(builder: Any, split: str, streaming: bool) -> Any:
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _open_one_by_one(
    builder: str,
    splits: Mapping[str, Sequence[str]],
    split: str,
    options: dict[str, Any],
    needed: Sequence[str],
    name: str,
    where: str,
) -> Any:
    """Open each file by itself, and join what all of them have: they are not alike."""
    paths = _in_order(splits)
    tables = {path: _open_alone(builder, path, options, name) for path in paths}
    full = {path: table for path, table in tables.items() if len(table)}
    if not full:
        raise DataError(f"{name}: holds no rows; its {len(tables)} files are all empty")
    columns = common({path: table.features for path, table in full.items()}, name)
    columns.require(needed, where)
    names = list(columns.features)
    alike = {
        path: table.select_columns(names).cast(columns.features) for path, table in full.items()
    }
    empty = next(iter(alike.values())).select([])
    joined = {
        part: datasets.concatenate_datasets([alike[p] for p in paths if p in alike] or [empty])
        for part, paths in splits.items()
    }
    opened = sliced(joined, split, where)
    if "[" not in split:
        rows = [(path, len(alike[path])) for path in _in_order(splits) if path in alike]
        remember_files(opened, rows)
    return opened


def _open_alone(builder: str, path: str, options: Mapping[str, Any], name: str) -> Any:
    """Open one file as a table. Raises DataError that names it."""
    try:
        return datasets.load_dataset(
            builder, data_files=_listed({"train": [path]}), split="train", **options
        )
    except Exception as error:  # every builder has its own
        raise _unreadable(path, name, error) from error


def _unreadable(path: str, name: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: {path} cannot be read: {_innermost(error)}{dialect_hint(error)}; mend the file, "
        "or leave it out of data_files"
    )


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
