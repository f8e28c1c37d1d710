"""Opens what a config names through `datasets`, and finds the column that the model sees."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet

from hpdist.config import Source
from hpdist.data.cached_addresses import redact_cached_addresses
from hpdist.data.decode import Column
from hpdist.errors import ConfigError, DataError

AnyColumn = TypeVar("AnyColumn", bound="str | tuple[str, ...]")

_FILE_BUILDERS = ("arrow", "audiofolder", "csv", "imagefolder", "json", "parquet")


def source_name(config: Source, dataset: Any, where: str) -> str:
    """What messages call a dataset: the setting, and what it names."""
    if dataset is not None:
        return f"{where} (the {type(dataset).__name__} given)"
    files = f", data_files {config.data_files!r}" if config.data_files else ""
    return f"{where} ({config.path}{files}, split {config.split!r})"


def load(config: Source, where: str, streaming: bool) -> Any:
    """`datasets.load_dataset`, with its many exceptions as one DataError that names the setting."""
    with _explained(config, where, streaming) as path:
        return datasets.load_dataset(
            path,
            config.name,
            data_files=config.data_files,
            revision=config.revision,
            split=config.split,
            streaming=streaming,
        )


def parquet_files(config: Source, where: str) -> dict[str, list[str]] | None:
    """The files of a Parquet dataset by split, as `datasets` finds them; None of any other."""
    given = _patterns(config.data_files)
    if config.path == "parquet" and given and all(_is_address(file) for file in given):
        files = config.data_files if isinstance(config.data_files, dict) else {"train": given}
        return {split: _patterns(part) for split, part in files.items()}
    with _explained(config, where, streaming=True) as path:
        builder = datasets.load_dataset_builder(
            path, config.name, data_files=config.data_files, revision=config.revision
        )
    if not isinstance(builder, Parquet):
        return None
    found = builder.config.data_files or {}
    return {str(split): [str(file) for file in files] for split, files in found.items()}


def _is_address(file: str) -> bool:
    """Whether it is one file on a web server, which leaves nothing to find."""
    return file.startswith(("http://", "https://")) and not set("*?[") & set(file.partition("?")[0])


@contextmanager
def _explained(config: Source, where: str, streaming: bool) -> Iterator[str]:
    """Check the path and give it; turn what `datasets` raises into a DataError."""
    path = os.path.expanduser(config.path)
    if config.path.startswith(("/", "./", "../", "~")) and not os.path.exists(path):
        raise DataError(f"{where}.path: {config.path!r} does not exist")
    _check_files(config, path, where)
    try:
        yield path
    except Exception as error:  # every builder and transport has its own
        raise DataError(_load_message(config, where, streaming, error)) from error
    finally:
        redact_cached_addresses([config.path, *_patterns(config.data_files)])


def _load_message(config: Source, where: str, streaming: bool, error: Exception) -> str:
    cause = one_line(error)
    if cause.startswith(("Unknown split", "Bad split")):
        hint = "; a stream takes no slices" if streaming and "[" in config.split else ""
        return f"{where}.split: {cause}{hint}"
    if "torchcodec" in cause:
        return (
            f"{where}.path: `datasets` makes a table of sound files only with torchcodec, which is "
            "not installed; install it, or write the files once as Parquet with `hpdist convert`"
        )
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
        return (
            f"{where}.path: {config.path!r} is no folder here, and the Hub did not give it: {cause}"
            "; check the spelling, the network and, for a gated dataset, `hf auth login`"
        )
    return f"{source_name(config, None, where)}: cannot be loaded: {cause}"


def _check_files(config: Source, path: str, where: str) -> None:
    """Raise DataError for a local pattern that matches nothing, which `datasets` may skip."""
    if not os.path.isdir(path) and path not in _FILE_BUILDERS:
        return  # relative names are then files on the Hub
    base = path if os.path.isdir(path) else ""
    for pattern in _patterns(config.data_files):
        local = "://" not in pattern and "::" not in pattern
        if local and not glob.glob(os.path.join(base, pattern), recursive=True):
            folder = base or os.getcwd()
            raise DataError(f"{where}.data_files: nothing matches {pattern!r} in {folder}")


def _patterns(data_files: str | list[str] | dict[str, str | list[str]] | None) -> list[str]:
    if data_files is None:
        return []
    if isinstance(data_files, str):
        return [data_files]
    parts: Iterable[Any] = data_files.values() if isinstance(data_files, dict) else data_files
    return [pattern for part in parts for pattern in _patterns(part)]


def one_line(error: BaseException) -> str:
    """Take the innermost explicit cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def raw_view(dataset: Any, columns: Sequence[str]) -> Any:
    """Take some columns of a dataset, in Arrow format, so undecoded."""
    return dataset.select_columns(list(columns)).with_format("arrow")


def same_column(column: AnyColumn, features: Any) -> AnyColumn | None:
    """Take the labelled set's columns, where this set has all of them."""
    return column if all(name in features for name in names_of(column)) else None


def names_of(column: Column) -> tuple[str, ...]:
    """The names of the columns that an input is in."""
    return (column,) if isinstance(column, str) else column


def check_order(column: Column, first: Column, where: str) -> None:
    """Raise DataError for the labelled set's columns in another order: other features, unsaid."""
    if column != first and sorted(names_of(column)) == sorted(names_of(first)):
        raise DataError(
            f"{where}.input: the columns are those of data.labeled.input in another order; "
            "write them in the same one"
        )


def known_column(features: Any, column: str, setting: str) -> str:
    """Give a column's name back; raises DataError where there is none of that name."""
    if column not in features:
        raise DataError(
            f"{setting}: there is no column {column!r}; there are {', '.join(features)}"
        )
    return column


def input_column(
    features: Any,
    column: Column | list[str] | None,
    where: str,
    exclude: str | None = None,
    *,
    text: bool = False,
    audio: bool = False,
) -> Column:
    """Find the column that the model sees: as named, else the only one of images, text or sound.

    Of a list of columns each must hold a number or a boolean, and none the label `exclude`; a list
    is never text or sound.
    """
    setting = f"{where}.input"
    what = "text" if text else "audio" if audio else "images"
    if isinstance(column, (list, tuple)):
        if text or audio:
            raise DataError(
                f"{setting}: a list of columns is no {what}, which views.name: {what} takes; name "
                f"one column of {what}, or set views.name: table, or identity"
            )
        _check_numbers(features, column, setting, exclude)
        return tuple(column)
    usual, fits = {
        "text": (_is_text, _is_text),
        "audio": (_is_audio, _is_audio),
        "images": (_is_image, _is_input),
    }[what]
    found: list[str] = [key for key in features if key != exclude and usual(features[key])]
    inputs = [key for key in features if key != exclude and fits(features[key])]
    candidates = f"candidates: {', '.join(inputs) or 'none'} (of the columns {', '.join(features)})"
    if column is None:
        if len(found) != 1:
            raise DataError(
                f"{setting}: name the input column, there are {len(found)} of {what}; {candidates}"
            )
        return found[0]
    feature = features[known_column(features, column, setting)]
    if fits(feature):
        return column
    wanted = "neither images nor arrays of numbers" if what == "images" else f"not {what}"
    hint = ""
    if what == "images" and isinstance(feature, datasets.Audio):
        hint = "; for audio set views.name: audio"
    elif what == "images" and _is_text(feature):
        hint = "; for text set views.name: text"
    elif what == "images" and _is_number(feature):
        hint = f"; a list makes a vector: [{column}]"
    raise DataError(f"{setting}: column {column!r} holds {feature}, {wanted}{hint}; {candidates}")


def _check_numbers(
    features: Any, columns: Sequence[str], setting: str, exclude: str | None
) -> None:
    for name in columns:
        feature = features[known_column(features, name, setting)]
        if name == exclude:
            raise DataError(f"{setting}: column {name!r} is the label; leave it out")
        if columns.count(name) > 1:
            raise DataError(f"{setting}: column {name!r} is there twice; name each once")
        if not _is_number(feature):
            kind = getattr(feature, "dtype", "")
            held = "text" if kind.endswith("string") else str(feature)
            raise DataError(
                f"{setting}: column {name!r} holds {held}, and a list of columns must hold numbers "
                "or booleans; write it as numbers, such as one column of 0 and 1 for each value, "
                "or leave it out"
            )


def _is_number(feature: Any) -> bool:
    kind = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.Value) and kind.startswith(("int", "uint", "float", "bool"))


def _is_image(feature: Any) -> bool:
    """Image, or what Parquet files hold of one without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "").endswith("binary")


def is_audio(features: Any, column: Column | list[str] | None) -> bool:
    """Whether a set has such a column, and of `datasets`' type for sound."""
    return isinstance(column, str) and isinstance(features.get(column), datasets.Audio)


def _is_audio(feature: Any) -> bool:
    """Audio, or what Parquet files hold of it without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, datasets.Audio):
        return True
    return _is_image(feature) and not isinstance(feature, datasets.Image)


def is_text(features: Any, column: Column | list[str] | None) -> bool:
    """Whether a set has such a column, and of text; a list of columns is none."""
    return isinstance(column, str) and column in features and _is_text(features[column])


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def text_beside(features: Any, column: str, where: str) -> str:
    """Give back the column of `views.strong_column`; raises ConfigError where it is no text."""
    texts = ", ".join(name for name in features if _is_text(features[name])) or "none"
    setting = f"views.strong_column: in {where}"
    if column not in features:
        raise ConfigError(
            f"{setting} there is no column {column!r}; there are {', '.join(features)} "
            f"(of text: {texts})"
        )
    if not _is_text(features[column]):
        raise ConfigError(
            f"{setting} column {column!r} holds {features[column]}, not text; of text: {texts}"
        )
    return column


def _is_input(feature: Any) -> bool:
    arrays = (datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList)
    return _is_image(feature) or isinstance(feature, arrays)


def open_table(config: Source, dataset: Any, where: str) -> tuple[Any, str]:
    """Open a map-style dataset; also its name for messages."""
    name = source_name(config, dataset, where)
    table = dataset if dataset is not None else load(config, where, streaming=False)
    if not isinstance(table, datasets.Dataset):
        raise DataError(
            f"{where}: needs a datasets.Dataset, not {type(table).__name__}; pick one split of a "
            "DatasetDict; only data.unlabeled takes an IterableDataset"
        )
    if table.format["type"] == "custom":
        raise DataError(f"{name}: its transform would be bypassed; apply it with Dataset.map")
    if not len(table):
        raise DataError(f"{name}: holds no rows")
    return table, name


def read_column(table: Any, column: str, name: str) -> list[Any]:
    """Read a whole column as Python values."""
    try:
        return list(raw_view(table, [column])[:][column].to_pylist())
    except Exception as error:
        raise DataError(f"{name}: cannot read column {column!r}: {one_line(error)}") from error
