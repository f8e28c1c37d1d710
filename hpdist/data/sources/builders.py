"""`datasets` builders for what its own ones refuse, and the way in that looks for no files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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

from hpdist.data.decode.arrow_types import plain_table
from hpdist.data.files.partitions import Partitions
from hpdist.data.sources.held import hold_parquet, table_key

_CACHED = "hpdist-1"  # changes when what these builders make of a file does
_ROWS = 1000  # of a batch, where the file does not say


def config_of(builder: str) -> type:
    """Give the class whose fields are the options of a builder of `datasets`."""
    known: type = datasets.load.import_main_class(
        f"datasets.packaged_modules.{builder}.{builder}"
    ).BUILDER_CONFIG_CLASS
    return known


def listed(splits: Mapping[str, Sequence[str]]) -> DataFilesDict:
    """List files as `datasets` takes them when it need not look for any: as they are spelled."""
    return DataFilesDict(
        {
            split: DataFilesList(list(paths), [(str(os.stat(p).st_mtime_ns),) for p in paths])
            for split, paths in splits.items()
        }
    )


def build(
    builder: type,
    dataset_name: str,
    splits: Mapping[str, Sequence[str]],
    split: str,
    streaming: bool,
    **options: Any,
) -> Any:
    """Open files with one of the builders of this module."""
    made = builder(dataset_name=dataset_name, data_files=listed(splits), hash=_CACHED, **options)
    if streaming:
        return made.as_streaming_dataset(split=split)
    made.download_and_prepare()
    return made.as_dataset(split=split)


@dataclass
class _UnlikeParquetConfig(ParquetConfig):  # type: ignore[misc]
    folders: Partitions = field(default_factory=Partitions)


class UnlikeParquet(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Parquet files that all have the columns of `features`, in types that can be cast to them.

    They may have further columns, which are left out; `folders` are columns that the names of their
    folders add.
    """

    BUILDER_CONFIG_CLASS = _UnlikeParquetConfig

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
        kept = pq.filters_to_expression(config.filters) if config.filters else None
        for number, path in enumerate(files):
            fragment = pd.ParquetFileFormat().make_fragment(path, LocalFileSystem())
            own = [name for name in schema.names if name in fragment.physical_schema.names]
            hold_parquet(path, None, own)
            rows = config.batch_size or max((g.num_rows for g in fragment.row_groups), default=0)
            batches = fragment.to_batches(columns=own, batch_size=rows or _ROWS, filter=kept)
            for place, batch in enumerate(batches):
                table = plain_table(pa.Table.from_batches([batch]))
                for column in config.folders.schema:
                    if column.name in schema.names and column.name not in own:
                        values = config.folders.constant(path, column, len(table))
                        table = table.append_column(column, values)
                yield table_key(number, place), table_cast(table, schema)


class OptionalKeys(Json):  # type: ignore[misc]
    """JSON of which later files may have keys that the first has not."""

    def _cast_table(self, pa_table: pa.Table, *more: Any, **options: Any) -> pa.Table:
        if self.info.features is not None:
            kept = [name for name in pa_table.column_names if name in self.info.features]
            pa_table = pa_table.select(kept)
        return super()._cast_table(pa_table, *more, **options)


class RawAudioFolder(ImageFolder):  # type: ignore[misc]
    """A folder of sound files, undecoded; `AudioFolder` takes their names with torchcodec alone.

    What it opens holds images, of which `Audio(decode=False)` has the same storage.
    """

    BASE_COLUMN_NAME = AudioFolder.BASE_COLUMN_NAME
    EXTENSIONS = AudioFolder.EXTENSIONS

    def _base_feature(self) -> Any:
        return datasets.Image(decode=False)
