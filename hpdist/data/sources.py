"""Open what the config names: labelled, test and unlabelled rows, checked before training starts.

    labeled = open_labeled(config.data.labeled, config.run.seed)
    spec = input_spec(labeled, size=32)
    unlabeled = open_unlabeled(config.data.unlabeled, labeled, spec)
    test = open_test(config.data.test, labeled, spec)

Rows are read through Hugging Face `datasets` in Arrow format, so that nothing is decoded before a
batch needs it and, of unlabelled rows, the label column is never read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np

from hpdist.config import LabelColumn, Labeled, Source, Unlabeled
from hpdist.data.decode import InputSpec, stored_values
from hpdist.errors import DataError

Int64Array: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_CHOICE = 0xC401CE  # keeps the draw of labels apart from everything else the seed feeds
_FILE_BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet")
_SCAN_ROWS = 256  # rows a streamed dataset hands over at once


@dataclass(frozen=True, eq=False)
class TableRows:
    """Rows of a map-style dataset, read by position and without decoding."""

    dataset: Any  # the input column alone, in Arrow format
    column: str
    name: str  # for messages: the setting and what it names
    ids: Int64Array  # [rows], each row's index in its split, ascending

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, positions: Int64Array) -> list[Any]:
        """Read the stored values at positions in 0..len(self).

        Raises DataError when the dataset's files cannot be read.
        """
        return self.read_split(self.ids[positions].tolist())

    def read_split(self, indices: list[int]) -> list[Any]:
        """Read the stored values at indices of the whole split."""
        if not indices:
            return []
        try:
            return stored_values(self.dataset[indices][self.column])
        except Exception as error:
            raise DataError(
                f"{self.name}: cannot read rows {indices[:3]}…: {_cause(error)}"
            ) from error


@dataclass(frozen=True)
class Classes:
    """The classes of the labelled split, which every other set is held to."""

    names: tuple[str, ...]
    named: bool  # labels are matched by name; otherwise by number

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class LabeledRows(TableRows):
    """Rows of a map-style dataset with a class each."""

    labels: Int64Array  # [rows], in 0..len(classes)
    classes: Classes
    label_column: str

    @property
    def chosen(self) -> list[int]:
        """The rows of the split that are used, ascending: what a resume passes back in."""
        return [int(row) for row in self.ids]


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Rows of a streamed dataset, read in file order and without decoding.

    A row's id is its place in file order. Nothing but that order is taken from `datasets`: its
    shuffling reorders the files too, which would move the ids, and cannot be resumed exactly.
    """

    dataset: Any  # the input column alone, in Arrow format
    column: str
    name: str
    buffer_rows: int  # rows that the shuffle window holds

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Read (id, stored value) of every row, in file order.

        Raises DataError when the source fails, naming the last row read.
        """
        row = 0
        # Two iterations of one IterableDataset share a position and lose rows; a shard has its own.
        tables = self.dataset.shard(num_shards=1, index=0).iter(batch_size=_SCAN_ROWS)
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                message = f"{self.name}: reading failed after row {row - 1}: {_cause(error)}"
                raise DataError(message) from error
            if table is None:
                return
            for value in stored_values(table[self.column]):
                yield row, value
                row += 1


def open_labeled(
    config: Labeled,
    seed: int,
    *,
    num_classes: int | None = None,
    chosen: list[int] | None = None,
    dataset: Any = None,
    where: str = "data.labeled",
) -> LabeledRows:
    """Open the labelled rows and choose those that are used, alike on every rank.

    `dataset` is a `datasets.Dataset` to use instead of loading `config.path`; `chosen` are the rows
    of an earlier run, used instead of drawing. Raises DataError when anything is not as the config
    says.
    """
    table, name = _open_table(config, dataset, where)
    features = table.features
    label = _label_column(features, config.label, where)
    column = _input_column(features, config.input, where, exclude=label)
    values = _read_column(table, label, name)
    classes = _classes(features[label], values, num_classes, where, label)
    labels = _label_ids(features[label], values, classes)
    given = chosen if chosen is not None else config.indices
    setting = f"{where}.indices" if chosen is None else f"{where}: the recorded choice of rows"
    _check_indices(given, len(labels), setting)
    used = range(len(labels)) if given is None else given
    _check_labels(labels, values, classes, used, name, label)
    drawn = _draw(config, labels, classes, seed, where) if given is None else given
    ids = np.sort(np.asarray(drawn, dtype=np.int64))
    view = _view(table, column)
    return LabeledRows(view, column, name, ids, labels[ids], classes, label)


def open_test(
    config: LabelColumn,
    like: LabeledRows,
    spec: InputSpec,
    *,
    dataset: Any = None,
    where: str = "data.test",
) -> LabeledRows:
    """Open all rows of a set that is measured on, with the labelled split's classes.

    Raises DataError when anything is not as the config says, or the first row does not fit `spec`.
    """
    table, name = _open_table(config, dataset, where)
    features = table.features
    label = _label_column(features, config.label or _same(like.label_column, features), where)
    column = _input_column(
        features, config.input or _same(like.column, features), where, exclude=label
    )
    values = _read_column(table, label, name)
    _label_kind(features[label], where, label)
    labels = _label_ids(features[label], values, like.classes)
    _check_labels(labels, values, like.classes, range(len(labels)), name, label)
    view = _view(table, column)
    rows = LabeledRows(view, column, name, np.arange(len(table)), labels, like.classes, label)
    spec.decode_rows(rows.read_split([0]), [0], name)
    return rows


def open_unlabeled(
    config: Unlabeled,
    like: LabeledRows,
    spec: InputSpec,
    *,
    dataset: Any = None,
    where: str = "data.unlabeled",
) -> TableRows | StreamedRows:
    """Open the unlabelled rows; an `IterableDataset`, or `streaming: true`, gives a stream.

    Raises DataError when anything is not as the config says, or the first row does not fit `spec`.
    """
    if isinstance(dataset, datasets.IterableDataset) or (dataset is None and config.streaming):
        return _open_stream(config, like, spec, dataset, where)
    table, name = _open_table(config, dataset, where)
    column = _input_column(
        table.features, config.input or _same(like.column, table.features), where
    )
    view = _view(table, column)
    rows = TableRows(view, column, name, np.arange(len(table)))
    spec.decode_rows(rows.read_split([0]), [0], name)
    return rows


def input_spec(rows: LabeledRows, size: int | None = None) -> InputSpec:
    """Derive how inputs are decoded from the first row of the labelled split.

    `size` resizes every image to size x size. Raises DataError when that row is no image or array.
    """
    try:
        return InputSpec.of(rows.read_split([0])[0], size)
    except Exception as error:  # image libraries raise nearly everything on a damaged file
        raise DataError(
            f"{rows.name}: row 0, column {rows.column!r}, tells no input shape: {_cause(error)}"
        ) from error


def _open_stream(
    config: Unlabeled, like: LabeledRows, spec: InputSpec, dataset: Any, where: str
) -> StreamedRows:
    stream = dataset if dataset is not None else _load(config, where, streaming=True)
    name = _name(config, dataset, where)
    first = _first_table(stream, name)
    features = stream.features or datasets.Features.from_arrow_schema(first.schema)
    column = _input_column(features, config.input or _same(like.column, features), where)
    row_bytes = max(1, first.select([column]).nbytes // first.num_rows)
    buffer_rows = max(1, config.shuffle_window // row_bytes)
    view = _view(stream, column)
    spec.decode_rows(stored_values(first[column])[:1], [0], name)
    return StreamedRows(view, column, name, buffer_rows)


def _first_table(stream: Any, name: str) -> Any:
    """Read the first rows of a stream as an Arrow table."""
    try:
        first = next(iter(stream.with_format("arrow").iter(batch_size=64)), None)
    except Exception as error:
        raise DataError(f"{name}: cannot read the first rows: {_cause(error)}") from error
    if first is None or not first.num_rows:
        raise DataError(f"{name}: holds no rows")
    return first


def _open_table(config: Source, dataset: Any, where: str) -> tuple[Any, str]:
    """Open a map-style dataset; also its name for messages."""
    name = _name(config, dataset, where)
    table = dataset if dataset is not None else _load(config, where, streaming=False)
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


def _name(config: Source, dataset: Any, where: str) -> str:
    if dataset is not None:
        return f"{where} (the {type(dataset).__name__} given)"
    files = f", data_files {config.data_files!r}" if config.data_files else ""
    return f"{where} ({config.path}{files}, split {config.split!r})"


def _load(config: Source, where: str, streaming: bool) -> Any:
    """`datasets.load_dataset`, with its many exceptions as one DataError that names the setting."""
    path = os.path.expanduser(config.path)
    if config.path.startswith(("/", "./", "../", "~")) and not os.path.exists(path):
        raise DataError(f"{where}.path: {config.path!r} does not exist")
    _check_files(config, path, where)
    try:
        return datasets.load_dataset(
            path,
            config.name,
            data_files=config.data_files,
            revision=config.revision,
            split=config.split,
            streaming=streaming,
        )
    except Exception as error:  # every builder and transport has its own
        raise DataError(_load_message(config, where, streaming, error)) from error


def _load_message(config: Source, where: str, streaming: bool, error: Exception) -> str:
    cause = _cause(error)
    if cause.startswith(("Unknown split", "Bad split")):
        hint = "; a stream takes no slices" if streaming and "[" in config.split else ""
        return f"{where}.split: {cause}{hint}"
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
        return (
            f"{where}.path: {config.path!r} is no folder here, and the Hub did not give it: {cause}"
            "; check the spelling, the network and, for a gated dataset, `hf auth login`"
        )
    return f"{_name(config, None, where)}: cannot be loaded: {cause}"


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


def _cause(error: BaseException) -> str:
    """Take the innermost explicit cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _view(dataset: Any, column: str) -> Any:
    """Take one column of a dataset, in Arrow format, so undecoded."""
    return dataset.select_columns([column]).with_format("arrow")


def _same(column: str, features: Any) -> str | None:
    """Take the labelled set's column, where this set has one of that name."""
    return column if column in features else None


def _known_column(features: Any, column: str, setting: str) -> str:
    if column not in features:
        raise DataError(
            f"{setting}: there is no column {column!r}; there are {', '.join(features)}"
        )
    return column


def _input_column(features: Any, column: str | None, where: str, exclude: str | None = None) -> str:
    """Find the column that the model sees: as named, else the only image column."""
    setting = f"{where}.input"
    images: list[str] = [key for key in features if _is_image(features[key])]
    inputs = [key for key in features if key != exclude and _is_input(features[key])]
    candidates = f"candidates: {', '.join(inputs) or 'none'} (of the columns {', '.join(features)})"
    if column is None:
        if len(images) != 1:
            raise DataError(
                f"{setting}: name the input column, there are {len(images)} of images; {candidates}"
            )
        return images[0]
    if not _is_input(features[_known_column(features, column, setting)]):
        raise DataError(
            f"{setting}: column {column!r} holds {features[column]}, neither images nor arrays of "
            f"numbers; {candidates}"
        )
    return column


def _is_image(feature: Any) -> bool:
    """Image, or what Parquet files hold of one without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "").endswith("binary")


def _is_input(feature: Any) -> bool:
    arrays = (datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList)
    return _is_image(feature) or isinstance(feature, arrays)


def _label_column(features: Any, column: str | None, where: str) -> str:
    """Find the column of labels: as named, else the only ClassLabel, else `label` or `labels`."""
    if column is not None:
        return _known_column(features, column, f"{where}.label")
    typed: list[str] = [key for key in features if isinstance(features[key], datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    for usual in ("label", "labels"):
        if usual in features:
            return usual
    raise DataError(f"{where}.label: name the column of labels; there are {', '.join(features)}")


def _read_column(table: Any, column: str, name: str) -> list[Any]:
    try:
        return list(_view(table, column)[:][column].to_pylist())
    except Exception as error:
        raise DataError(f"{name}: cannot read column {column!r}: {_cause(error)}") from error


def _label_kind(feature: Any, where: str, column: str) -> str:
    """'class', 'string' or 'integer'."""
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    dtype = getattr(feature, "dtype", "")
    if dtype.endswith("string"):
        return "string"
    if dtype.startswith(("int", "uint", "bool")):
        return "integer"
    raise DataError(
        f"{where}.label: column {column!r} is {feature}; labels are classes, integers or strings"
    )


def _classes(
    feature: Any, values: list[Any], num_classes: int | None, where: str, column: str
) -> Classes:
    """List the classes: ClassLabel's names, 0..largest, or the strings, sorted."""
    kind = _label_kind(feature, where, column)
    present = {value for value in values if value is not None}
    if kind == "integer":
        count = num_classes or int(max(present, default=-1)) + 1
        return Classes(tuple(str(number) for number in range(count)), named=False)
    names = tuple(feature.names if kind == "class" else sorted(present))
    if num_classes is not None and num_classes != len(names):
        raise DataError(
            f"{where}.label: column {column!r} has {len(names)} classes, but model.num_classes is "
            f"{num_classes}; make them equal"
        )
    return Classes(names, named=True)


def _label_ids(feature: Any, values: list[Any], classes: Classes) -> Int64Array:
    """Each row's class number; -1 where the label is null or none of the classes."""
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if classes.named and (names or any(isinstance(value, str) for value in values)):
        number: dict[Any, int] = {name: index for index, name in enumerate(classes.names)}
        if names is not None:
            number = {at: number[name] for at, name in enumerate(names) if name in number}
    else:
        number = {index: index for index in range(len(classes))}
    return np.fromiter((number.get(value, -1) for value in values), np.int64, len(values))


def _check_labels(
    labels: Int64Array,
    values: list[Any],
    classes: Classes,
    rows: Sequence[int],
    name: str,
    column: str,
) -> None:
    """Raise DataError for the first of `rows` that has no class."""
    for row in rows:
        if labels[row] < 0:
            shown = ", ".join(classes.names[:12]) + (", …" if len(classes) > 12 else "")
            raise DataError(
                f"{name}: row {row} has the label {values[row]!r} in column {column!r}, which is "
                f"none of the {len(classes)} classes ({shown}); mend the row or leave it out"
            )


def _check_indices(indices: list[int] | None, rows: int, setting: str) -> None:
    if indices is None:
        return
    if not indices:
        raise DataError(f"{setting}: names no rows")
    seen: set[int] = set()
    for index in indices:
        if not 0 <= index < rows:
            raise DataError(
                f"{setting}: {index} is out of range; the split has rows 0 to {rows - 1}"
            )
        if index in seen:
            raise DataError(f"{setting}: {index} is repeated; name every row once")
        seen.add(index)


def _draw(
    config: Labeled, labels: Int64Array, classes: Classes, seed: int, where: str
) -> Int64Array:
    """Draw the labelled rows from the seed alone, so that every rank draws the same."""
    generator = np.random.default_rng([seed, _CHOICE])
    if config.rows is not None:
        if config.rows > len(labels):
            raise DataError(f"{where}.rows: {config.rows} asked for, the split has {len(labels)}")
        return generator.choice(len(labels), config.rows, replace=False)
    if config.labels_per_class is None:
        return np.arange(len(labels))
    wanted = config.labels_per_class
    parts = []
    for number, class_name in enumerate(classes.names):
        of_class = np.flatnonzero(labels == number)
        if len(of_class) < wanted:
            raise DataError(
                f"{where}.labels_per_class: {wanted} asked for, "
                f"class {class_name!r} has {len(of_class)}"
            )
        parts.append(generator.choice(of_class, wanted, replace=False))
    return np.concatenate(parts)
