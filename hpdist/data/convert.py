"""Write unlabelled rows as Parquet files that a stream can read from any place.

    written = convert(config.data.unlabeled, Path("rows"), input="image")
    print(written.yaml())

JSON lines, CSV, tar files and folders of images can only be read from their beginning. Written once
as Parquet, in small row groups, they are read exactly once per epoch on any number of ranks, and
resuming costs no reading. All columns and the `datasets` features are kept; images that are named
by their path alone are put into the files. No file looks whole before all of them are.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import yaml
from datasets.features.features import require_storage_embed
from datasets.table import table_cast

from hpdist.data.config import Loading, Source
from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.decode.stored_values import Column
from hpdist.data.files.named_files import PathRule
from hpdist.data.kinds import kind_of_type, only_certain
from hpdist.data.sources.embedding import embedded
from hpdist.data.sources.loading import (
    check_dialect,
    load_files,
    same_column,
)
from hpdist.data.sources.local_files import source_name
from hpdist.data.sources.own_files import path_rule
from hpdist.data.stream.blocks import read_blocks
from hpdist.data.stream.row_files import RowFiles
from hpdist.errors import ConfigError, DataError, one_line
from hpdist.messages.redaction import redacted_text

_READ_ROWS = 32  # few enough for large images
_PROBE_ROWS = 64  # show which columns are worth compressing
_WORTH = 0.9  # what compression must make of a column's size
_UNFINISHED = "train-{:05}.parquet.unfinished"


@dataclass(frozen=True)
class Layout:
    """Sizes of what is written, in bytes before compression."""

    group_bytes: int = 256 * 2**10
    """Bytes of a row group, which a stream reads at once: small ones mix well and resume fast."""
    group_rows: int = 1000
    """Most rows of a row group."""
    shard_bytes: int = 256 * 2**20
    """Bytes of a file, after compression."""


@dataclass(frozen=True)
class Written:
    """What a conversion wrote."""

    files: tuple[Path, ...]
    rows: int
    groups: int
    bytes: int
    input: Column | None
    """The input column or columns; None where training finds them, as it does in a table."""

    def yaml(self) -> str:
        """The lines of a config that read it; they replace what named the dataset before."""
        source = {
            "path": "parquet",
            "data_files": str(self.files[0].parent / "train-*.parquet"),
            "streaming": True,
        }
        if self.input is not None:
            source["input"] = self.input if isinstance(self.input, str) else list(self.input)
        return yaml.safe_dump({"data": {"unlabeled": source}}, sort_keys=False, width=10_000)


def convert(
    config: Source,
    folder: Path,
    *,
    input: str | list[str] | None = None,  # noqa: A002  # what the config calls it
    where: str = "data.unlabeled",
    loading: Loading | None = None,
    layout: Layout | None = None,
    bar: Any = None,
) -> Written:
    """Read a dataset once and write it into `folder` as train-00000-of-00012.parquet and so on.

    `input` is the labelled rows' column, where the config names none; where neither does, all
    columns are written all the same, and training finds the input as it would have before.
    `loading` says which files rows may name; `bar` is a tqdm to update. Raises ConfigError for a
    folder that cannot be used and DataError for rows that cannot be read.
    """
    _check_folder(folder)
    stream, found = load_files(config, where, streaming=True, loading=loading)
    rule = path_rule(config, loading, given=False, files=found)
    name = redacted_text(source_name(config, None, where))
    view = stream.with_format("arrow")
    most = (loading or Loading()).most_unpacked
    features = _features(view, name, most)
    check_dialect(features, where)
    given = config.input or _same(input, features)
    column: Column | None = only_certain(features)
    if given is not None:
        found_kind = kind_of_type(features, given if isinstance(given, str) else None)
        column = found_kind.find_columns(features, given, where)
    writer = _Writer(folder, features, layout or Layout())
    try:
        for table in _embedded(view, features, name, rule, most):
            writer.write(table)
            if bar is not None:
                bar.update(len(table))
        written = writer.finish()
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {one_line(error)}") from error
    finally:
        writer.discard()
    size = sum(file.stat().st_size for file in written)
    return Written(written, writer.rows, writer.groups, size, column)


def _same(column: str | list[str] | None, features: Any) -> Column | None:
    given = tuple(column) if isinstance(column, list) else column
    return same_column(given, features) if given else None


def _check_folder(folder: Path) -> None:
    """Make the folder; raise ConfigError where it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"--out: {str(folder)!r} cannot be used: {error.strerror}") from error
    parquet = [file for file in found if file.endswith(".parquet")]
    if parquet:
        raise ConfigError(
            f"--out: {str(folder)!r} holds Parquet files already ({parquet[0]}); name another "
            "folder, or remove them"
        )
    for file in found:
        if fnmatch(file, "train-*.parquet.unfinished"):  # of a conversion that was killed
            (folder / file).unlink()


def _features(view: Any, name: str, most: int) -> Any:
    """The features of a stream; those of its first rows, where it declares none.

    In plain types, since Arrow cannot write slices of every other one.
    """
    if view.features is not None:
        schema = view.features.arrow_schema
        plain = plain_schema(schema)
        return view.features if plain == schema else datasets.Features.from_arrow_schema(plain)
    _, first = next(read_blocks(view, name, _PROBE_ROWS, most=most), (None, None))
    if first is None:
        raise DataError(f"{name}: holds no rows")
    return datasets.Features.from_arrow_schema(plain_schema(first.schema))


def _embedded(view: Any, features: Any, name: str, rule: PathRule, most: int) -> Iterator[pa.Table]:
    """All rows, with the files that they name put into them, in one schema.

    A row that names a file which the rule forbids is an error: what is written may be passed on.
    """
    schema = features.arrow_schema
    embeds = any(require_storage_embed(feature) for feature in features.values())
    row, files = 0, RowFiles()
    for _, table in read_blocks(view, name, _READ_ROWS, files=files, most=most):
        try:
            typed = table if table.schema == schema else table_cast(table, schema)
            if embeds:
                typed = embedded(typed, features, rule)
        except Exception as error:  # every image and every transport has its own
            place = files.place(row)
            first = "" if place is None else f" (the first: {place})"
            raise DataError(
                f"{name}: rows {row} to {row + len(table) - 1}{first} cannot be converted: "
                f"{redacted_text(one_line(error))}"
            ) from error
        yield typed
        row += len(table)
    if not row:
        raise DataError(f"{name}: holds no rows")


class _Writer:
    """Cuts tables into row groups and files, under names that no reader takes for whole files."""

    def __init__(self, folder: Path, features: Any, layout: Layout) -> None:
        self.rows = 0
        self.groups = 0
        self._folder = folder
        self._schema = features.arrow_schema
        self._layout = layout
        self._options: dict[str, Any] = {}
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0
        self._unfinished: list[Path] = []
        self._file: Any = None
        self._parquet: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._pending.append(table)
        self._pending_rows += len(table)
        self._pending_bytes += table.nbytes
        if not self._options and self._pending_rows < _PROBE_ROWS:
            return
        if (
            self._pending_bytes >= self._layout.group_bytes
            or self._pending_rows >= self._layout.group_rows
        ):
            self._cut(final=False)

    def finish(self) -> tuple[Path, ...]:
        """Write the last rows, and give the files their names."""
        self._cut(final=True)
        self._close()
        count = len(self._unfinished)
        files = [self._folder / f"train-{n:05}-of-{count:05}.parquet" for n in range(count)]
        for unfinished, file in zip(self._unfinished, files, strict=True):
            unfinished.rename(file)
        self._unfinished = []
        return tuple(files)

    def discard(self) -> None:
        """Remove what was not finished."""
        if self._parquet is not None:
            with suppress(OSError):  # what it still writes may not fit on the disk either
                self._parquet.close()
            with suppress(OSError):
                self._file.close()
        for file in self._unfinished:
            file.unlink(missing_ok=True)

    def _cut(self, final: bool) -> None:
        """Write the pending rows that fill a row group; at the end, all."""
        table = pa.concat_tables(self._pending)
        self._options = self._options or _options(table.slice(0, _PROBE_ROWS))
        while len(table):
            fitting = len(table) * self._layout.group_bytes // max(1, table.nbytes)
            rows = max(1, min(fitting, self._layout.group_rows))
            if rows >= len(table) and not final:
                break
            self._write_group(table.slice(0, rows))
            table = table.slice(rows)
        self._pending, self._pending_rows, self._pending_bytes = [table], len(table), table.nbytes

    def _write_group(self, group: pa.Table) -> None:
        if self._parquet is None:
            self._unfinished.append(self._folder / _UNFINISHED.format(len(self._unfinished)))
            self._file = self._unfinished[-1].open("xb")
            self._parquet = pq.ParquetWriter(self._file, self._schema, **self._options)
        self._parquet.write_table(group, row_group_size=len(group))
        self.rows += len(group)
        self.groups += 1
        if self._file.tell() >= self._layout.shard_bytes:
            self._close()

    def _close(self) -> None:
        if self._parquet is None:
            return
        self._parquet.close()
        self._parquet = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _options(table: pa.Table) -> dict[str, Any]:
    """How to write columns like these: only what shrinks is compressed.

    Page checksums tell a damaged page from a whole one. Statistics would put copies of small images
    into the footer.
    """
    probe = io.BytesIO()
    pq.write_table(table, probe, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(probe).metadata.row_group(0)
    leaves = [group.column(number) for number in range(group.num_columns)]
    shrinking = [
        leaf.path_in_schema
        for leaf in leaves
        if leaf.total_compressed_size < _WORTH * leaf.total_uncompressed_size
    ]
    return {
        "compression": {
            leaf.path_in_schema: "zstd" if leaf.path_in_schema in shrinking else "none"
            for leaf in leaves
        },
        "use_dictionary": shrinking,
        "write_page_checksum": True,
        "write_statistics": False,
    }
