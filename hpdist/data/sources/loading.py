"""Opens what a config names through `datasets`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet

from hpdist.data.config import LabelColumn, Loading, Source
from hpdist.data.decode.stored_values import Column, names_of
from hpdist.data.files.cached_addresses import redact_cached_addresses
from hpdist.data.files.named_files import PathRule
from hpdist.data.files.paths import did_you_mean, local_path, neighbour
from hpdist.data.files.row_names import same_files
from hpdist.data.files.unpacked import check_archives, unpacking
from hpdist.data.sources.builders import config_of
from hpdist.data.sources.coded import coded
from hpdist.data.sources.held import hold_builder
from hpdist.data.sources.local_files import (
    ENDINGS,
    FILE_BUILDERS,
    FOLDERS,
    LocalFiles,
    extension,
    local_files,
    patterns_of,
    source_name,
)
from hpdist.data.sources.local_tables import open_files
from hpdist.data.sources.options import (
    check_options,
    check_stream_options,
    dialect_hint,
    header_hint,
    separator_hint,
)
from hpdist.data.sources.own_files import path_rule
from hpdist.data.sources.parquet_table import ParquetTable
from hpdist.data.sources.saved import is_saved, open_saved
from hpdist.errors import DataError, HpdistError, one_line

AnyColumn = TypeVar("AnyColumn", bound="str | tuple[str, ...]")


def load(config: Source, where: str, streaming: bool, needed: Sequence[str] = ()) -> Any:
    """Open what a config names, with the many exceptions of `datasets` as one DataError.

    `needed` are columns, beside those that the config names, that every file must have. Raises
    ConfigError for options that there are not.
    """
    return load_files(config, where, streaming, needed)[0]


def load_files(
    config: Source,
    where: str,
    streaming: bool,
    needed: Sequence[str] = (),
    loading: Loading | None = None,
    *,
    in_place: bool = False,
) -> tuple[Any, LocalFiles | None]:
    """Do as `load` does; also say which files of this machine are read, where it found them.

    With `in_place`, Parquet files of this machine are opened as a `ParquetTable`. What they hold is
    counted against `loading.most_unpacked`, as far as it is read here; whoever reads a stream, or
    rows of such a table, goes on counting.
    """
    most = (loading or Loading()).most_unpacked
    with _explained(config, where, streaming), unpacking(most):
        if is_saved(config):
            table = open_saved(config, where)
            return table.to_iterable_dataset() if streaming else table, None
        files = local_files(config, where)
        if files is None:
            opened = _load_elsewhere(config, where, streaming)
        else:
            every = [path for paths in files.splits.values() for path in paths]
            many = files.builder in FOLDERS  # of which looking into each would take long
            check_archives(file for file in every if not many or file.endswith(".zip"))
            check_options(config.options, files.builder, config_of(files.builder), where)
            opened = open_files(
                files,
                config.split,
                config.options,
                streaming=streaming,
                needed=[*_named_columns(config), *needed],
                name=source_name(config, None, where),
                where=where,
                copied=(lambda: load_files(config, where, streaming, needed, loading)[0])
                if in_place
                else None,
            )
    if files is not None and files.builder == "csv":
        check_dialect(opened.features, where, config)
    return opened, files


def parquet_files(config: Source, where: str) -> LocalFiles | None:
    """The files of a Parquet dataset by split, wherever they lie; None of any other dataset."""
    given = patterns_of(config.data_files)
    if config.path == "parquet" and given and all(_is_address(file) for file in given):
        files = config.data_files if isinstance(config.data_files, dict) else {"train": given}
        return LocalFiles("parquet", {split: patterns_of(part) for split, part in files.items()})
    with _explained(config, where, streaming=True):
        if is_saved(config):
            return None
        found = local_files(config, where)
        if found is None:
            builder = datasets.load_dataset_builder(
                _path(config),
                config.name,
                data_files=_data_files(config),
                revision=config.revision,
            )
            if isinstance(builder, Parquet):
                named = builder.config.data_files or {}
                splits = {str(split): [str(f) for f in files] for split, files in named.items()}
                found = LocalFiles("parquet", splits)
    if found is None or found.builder != "parquet":
        return None
    check_stream_options(config.options, where)
    return found


def check_dialect(features: Any, where: str, config: Source | None = None) -> None:
    """Raise DataError where the columns of a CSV file show that it was read by other rules.

    That is where it seems to have one column alone, or lacks one that the config needs, and the
    names of those that it has look like something else.
    """
    columns = list(features or ())
    named = [] if config is None else _named_columns(config)
    lacking = [name for name in named if name not in columns]
    if isinstance(config, LabelColumn) and config.label is None:
        lacking += [] if {"label", "labels"} & set(columns) else ["label"]
    hint = separator_hint(columns) or (header_hint(columns) if lacking else None)
    if hint is not None:
        raise DataError(f"{where}: {hint}")


def _load_elsewhere(config: Source, where: str, streaming: bool) -> Any:
    """Load what lies on the Hub or on another server, or says itself how it is read."""
    split = config.split
    named: dict[str, Any] = {
        "name": config.name,
        "data_files": _data_files(config),
        "revision": config.revision,
    }
    if config.options:
        builder = datasets.load_dataset_builder(_path(config), **named)
        check_options(config.options, builder.name, type(builder.config), where)
    check_archives([config.path, *patterns_of(config.data_files)])
    builder = datasets.load_dataset_builder(_path(config), **named, **config.options)
    hold_builder(builder)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _named_columns(config: Source) -> list[str]:
    """The columns that a config names, which all of its files must have."""
    inputs = [config.input] if isinstance(config.input, str) else config.input or []
    label = getattr(config, "label", None)
    return [*inputs, *([label] if label else []), *getattr(config, "columns", ())]


def _path(config: Source) -> str:
    path = local_path(config.path)
    return config.path if path is None or not os.path.exists(path) else path


def _data_files(config: Source) -> Any:
    """The files as `datasets` takes them: it knows no `~`."""

    def known(part: Any) -> Any:
        return os.path.expanduser(part) if isinstance(part, str) else [known(one) for one in part]

    given = config.data_files
    if isinstance(given, dict):
        return {split: known(part) for split, part in given.items()}
    return None if given is None else known(given)


def _is_address(file: str) -> bool:
    """Whether it is one file on a web server, which leaves nothing to find."""
    return file.startswith(("http://", "https://")) and not set("*?[") & set(file.partition("?")[0])


@contextmanager
def _explained(config: Source, where: str, streaming: bool) -> Iterator[None]:
    """Check that a local path is there; turn what `datasets` raises into a DataError."""
    _check_path(config, where)
    try:
        with _quiet_readers():
            yield
    except HpdistError:
        raise
    except Exception as error:  # every builder and transport has its own
        raise DataError(_load_message(config, where, streaming, error)) from error
    finally:
        redact_cached_addresses([config.path, *patterns_of(config.data_files)])


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """Keep the readers of `datasets` from logging the file and the error that DataError names."""
    readers = [logging.getLogger(f"datasets.packaged_modules.{b}.{b}") for b in FILE_BUILDERS]

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Failed to read file", "Failed to load JSON"))

    for reader in readers:
        reader.addFilter(is_news)
    try:
        yield
    finally:
        for reader in readers:
            reader.removeFilter(is_news)


_PICKLES = "pandas"  # a builder of `datasets`


def _check_path(config: Source, where: str) -> None:
    """Raise DataError for a local path that is not there, before the Hub is asked for it.

    Also for files whose reading would run what is in them.
    """
    if config.path == _PICKLES:
        raise DataError(
            f"{where}.path: {_PICKLES} reads pickles, which run code of whoever wrote them; write "
            "the table as Parquet (DataFrame.to_parquet), and name that"
        )
    if config.path in FILE_BUILDERS:
        if config.data_files is None and not os.path.exists(config.path):
            raise DataError(
                f"{where}.data_files: path: {config.path} reads files of that kind; name them"
            )
        return
    path = local_path(config.path)
    if path is None or os.path.exists(path):
        return
    if os.path.islink(path):
        raise DataError(
            f"{where}.path: {config.path!r} is a link that leads nowhere: to {os.readlink(path)!r}"
        )
    if _looks_local(config.path, path):
        raise DataError(
            f"{where}.path: {config.path!r} does not exist{did_you_mean(path)}{_hint(config.path)}"
        )


def _hint(path: str) -> str:
    """Say what else a path that does not exist may have been meant to be."""
    if set("*?") & set(path):
        return "; a pattern goes into data_files"
    return f" That of the Hub is hf://datasets/{path}" if _may_be_of_the_hub(path) else ""


def _may_be_of_the_hub(path: str) -> bool:
    """Whether it is of the form user/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and path[0] not in ".~/"


def _looks_local(given: str, path: str) -> bool:
    """Whether a path that is not there is one of this machine, and no name on the Hub."""
    if given.startswith("buckets/"):  # a storage bucket of the Hub
        return False
    return (
        given.startswith(("/", "./", "../", "~", "file://", "local://"))
        or len(given.rstrip("/").split("/")) > 2  # the Hub's are name, or user/name
        or extension(path) in ENDINGS
        or bool(set(" *?[]{}") & set(given))  # no name on the Hub has any of these
        or (_may_be_of_the_hub(given) and neighbour(path) is not None)
    )


def _load_message(config: Source, where: str, streaming: bool, error: Exception) -> str:
    cause = one_line(error)
    if cause.startswith(("Unknown split", "Bad split")):
        hint = "; a stream takes no slices" if streaming and "[" in config.split else ""
        return f"{where}.split: {cause}{hint}"
    if "torchcodec" in cause:
        return (
            f"{where}.path: `datasets` makes a table of sound files on a server only with "
            "torchcodec, which is not installed; install it, write the files once as Parquet with "
            "`hpdist convert`, or keep them on this machine"
        )
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
        return (
            f"{where}.path: {config.path!r} is no folder here, and the Hub did not give it: {cause}"
            "; check the spelling, the network and, for a gated dataset, `hf auth login`"
            f"{did_you_mean(config.path)}"
        )
    named = source_name(config, None, where)
    return f"{named}: cannot be loaded: {cause}{dialect_hint(error)}"


def raw_view(dataset: Any, columns: Sequence[str]) -> Any:
    """Take some columns of a dataset, in Arrow format, so undecoded."""
    view = dataset.select_columns(list(columns)).with_format("arrow")
    same_files(dataset, view)
    return view


def same_column(column: AnyColumn, features: Any) -> AnyColumn | None:
    """Take the labelled set's columns, where this set has all of them."""
    return column if all(name in features for name in names_of(column)) else None


def same_input(column: Column, features: Any, where: str) -> Column | None:
    """Do as `same_column` does; of several columns this set must have all, or DataError."""
    found = same_column(column, features)
    if found is None and not isinstance(column, str):
        missing = ", ".join(repr(name) for name in column if name not in features)
        raise DataError(
            f"{where}: the input of data.labeled is the columns {', '.join(column)}, and there is "
            f"no column {missing} here; there are {', '.join(features)}; add it, or name "
            f"{where}.input"
        )
    return found


def check_order(column: Column, first: Column, where: str) -> None:
    """Raise DataError for the labelled set's columns in another order: other features, unsaid."""
    if column != first and sorted(names_of(column)) == sorted(names_of(first)):
        raise DataError(
            f"{where}.input: the columns are those of data.labeled.input in another order; "
            "write them in the same one"
        )


def open_table(
    config: Source,
    dataset: Any,
    where: str,
    needed: Sequence[str] = (),
    loading: Loading | None = None,
    *,
    in_place: bool = False,
) -> tuple[Any, str, PathRule]:
    """Open a map-style dataset; also its name for messages, and which files its rows may name.

    `needed` are columns that each of its files must have, beside those that the config names. With
    `in_place` it may be a `ParquetTable`, whose rows are for `rows_of`.
    """
    name = source_name(config, dataset, where)
    files = None
    table = dataset
    if dataset is None:
        table, files = load_files(config, where, False, needed, loading, in_place=in_place)
    if not isinstance(table, (datasets.Dataset, ParquetTable)):
        raise DataError(
            f"{where}: needs a datasets.Dataset, not {type(table).__name__}; pick one split of a "
            "DatasetDict; only data.unlabeled takes an IterableDataset"
        )
    if table.format["type"] == "custom":
        raise DataError(f"{name}: its transform would be bypassed; apply it with Dataset.map")
    if not len(table):
        raise DataError(f"{name}: holds no rows")
    return table, name, path_rule(config, loading, given=dataset is not None, files=files)


def read_column(table: Any, column: str, name: str) -> Sequence[Any]:
    """Read a whole column as Python values; of few different ones each is held once."""
    try:
        stored = raw_view(table, [column])[:][column]
        values = coded(stored)
        return list(stored.to_pylist()) if values is None else values
    except Exception as error:
        raise DataError(f"{name}: cannot read column {column!r}: {one_line(error)}") from error
