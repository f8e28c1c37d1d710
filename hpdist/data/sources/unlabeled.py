"""Open the unlabelled rows: a table, a Parquet stream, any other stream, or several mixed.

What costs requests (finding files, reading footers) is `survey`, which one process does for all;
`open_unlabeled` then needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets

from hpdist.aliases import find_moved
from hpdist.data.config import Loading, Unlabeled, UnlabeledSource
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column, names_of
from hpdist.data.files.named_files import NOTHING, PathRule
from hpdist.data.files.open import Retry
from hpdist.data.files.partitions import partitions
from hpdist.data.files.row_names import describe_row, describe_rows
from hpdist.data.files.unpacked import unpacking
from hpdist.data.kinds import kind_named
from hpdist.data.kinds.columns import known_column
from hpdist.data.sources.first_rows import TRIED, check_fit, check_parquet_fit
from hpdist.data.sources.known_types import known_features
from hpdist.data.sources.labeled import LabeledRows, UnlabeledTable
from hpdist.data.sources.loading import (
    check_dialect,
    check_order,
    load_files,
    open_table,
    parquet_files,
    raw_view,
    same_input,
)
from hpdist.data.sources.local_files import source_name
from hpdist.data.sources.long_tail import rows_used
from hpdist.data.sources.options import dialect_hint
from hpdist.data.sources.own_files import path_rule
from hpdist.data.sources.saved import is_saved
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled, MixedRows, ParquetRows, SequentialRows
from hpdist.data.stream.functions import RowFunctions, row_functions
from hpdist.data.stream.index import Index
from hpdist.data.stream.index_build import build_index, split_files
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.row_files import RowFiles
from hpdist.errors import DataError, one_line

_BLOCK_BYTES = 64 * 2**20  # that a stream without row counts is shuffled in


@dataclass(frozen=True)
class DatasetIndexes:
    """What was found of a Parquet dataset."""

    index: Index
    column: Column
    columns: tuple[str, ...]
    recorded: list[list[Any]] | None
    rule: PathRule = NOTHING
    """Which files the rows may name."""


DatasetIndex: TypeAlias = list[DatasetIndexes | None]


def scan_metadata(
    config: Unlabeled,
    like: LabeledRows,
    spec: InputSpec,
    loading: Loading,
    recorded: Sequence[Any] | None = None,
    where: str = "data.unlabeled",
) -> DatasetIndex:
    """Find the files of every part that is streamed from Parquet; None for any other part.

    One process does this and gives the others what it found. Raises DataError.
    """
    found: DatasetIndex = []
    for number, (part, setting) in enumerate(_parts(config, where)):
        known = recorded[number] if recorded is not None and number < len(recorded) else None
        scanned = None
        if part.streaming:
            budget = config.shuffle_window
            scanned = _scan_parquet(part, like, spec, loading, budget, setting, known)
        found.append(scanned)
    return found


def open_unlabeled(
    config: Unlabeled,
    like: LabeledRows,
    spec: InputSpec,
    *,
    dataset: Any = None,
    where: str = "data.unlabeled",
    found: DatasetIndex | None = None,
    loading: Loading | None = None,
    seed: int = 0,
    ids: Int64Array | None = None,
) -> AnyUnlabeled:
    """Open the unlabelled rows; an `IterableDataset`, or `streaming: true`, gives a stream.

    `found` is what `survey` gave; `seed` draws the rows of a long-tailed set; `ids` are rows of a
    table that are used in place of all, int64 [rows]. Raises DataError when anything is not as the
    config says, or none of the first rows fits `spec`.
    """
    if ids is not None:
        return _open_unlabeled_table(config, like, spec, dataset, where, seed, loading, ids)
    if dataset is not None:
        if isinstance(dataset, datasets.IterableDataset):
            if config.imbalance is not None:
                raise DataError(
                    f"{where}.imbalance: the labels of all rows are needed before the first is "
                    "read, and an IterableDataset is read row by row; give a datasets.Dataset"
                )
            return _open_sequential(config, config, like, spec, dataset, where, loading)
        return _open_unlabeled_table(config, like, spec, dataset, where, seed, loading)
    if found is None:
        found = scan_metadata(config, like, spec, loading or Loading(), None, where)
    parts: list[ParquetRows | UnlabeledTable] = []
    retry = _retry(loading or Loading())
    for (part, setting), scanned in zip(_parts(config, where), found, strict=True):
        if scanned is not None:
            parts.append(_parquet_rows(part, config, scanned, spec, retry, setting))
        elif not part.streaming or is_saved(part):
            parts.append(_open_unlabeled_table(part, like, spec, None, setting, seed, loading))
        elif config.mix:
            raise DataError(
                f"{setting}: only Parquet and tables can be mixed, since other streams do not say "
                "how many rows they have; convert it with `hpdist convert`, or set streaming: false"
            )
        else:
            return _open_sequential(part, config, like, spec, None, setting, loading)
    if not config.mix:
        return parts[0]
    weights = tuple(part.weight for part in config.mix)
    return MixedRows(tuple(parts), weights, f"{where}.mix")


def _parts(config: Unlabeled, where: str) -> list[tuple[UnlabeledSource, str]]:
    if not config.mix:
        return [(config, where)]
    return [(part, f"{where}.mix.{number}") for number, part in enumerate(config.mix)]


def _scan_parquet(
    part: UnlabeledSource,
    like: LabeledRows,
    spec: InputSpec,
    loading: Loading,
    budget: int | None,
    where: str,
    recorded: list[list[Any]] | None,
) -> DatasetIndexes | None:
    files = parquet_files(part, where)
    if files is None:
        return None
    retry = _retry(loading)
    rule = path_rule(part, loading, given=False, files=files)
    name = source_name(part, None, where)
    chosen = split_files(files.splits, part.split, where)
    folders = partitions([f for of_split in chosen.values() for f in of_split], files.base)

    def columns_of(schema: Any) -> tuple[Column, tuple[str, ...], RowFunctions]:
        features = known_features(schema)
        kept = part.options.get("columns") or list(features)
        features = {name: feature for name, feature in features.items() if name in kept}
        return _columns(part, features, like, spec, where, rule)

    index = build_index(
        chosen, part.split, lambda schema: columns_of(schema)[1], name, retry, folders
    )
    column, columns, functions = columns_of(index.arrow_schema)
    order = {"kind": "parquet", "lanes": 1, "groups_per_window": 1}
    reader = ParquetReader(index, columns, name, 0, 1, budget=budget, order=order, retry=retry)
    try:
        check_parquet_fit(reader, functions, spec, name)
    finally:
        reader.close()
    return DatasetIndexes(index, column, columns, recorded, rule)


def _retry(loading: Loading) -> Retry:
    return Retry(loading.patience, stall=min(Retry.stall, loading.patience))


def _parquet_rows(
    part: UnlabeledSource,
    config: Unlabeled,
    scanned: DatasetIndexes,
    spec: InputSpec,
    retry: Retry,
    where: str,
) -> ParquetRows:
    functions = row_functions(part, scanned.column, where, spec.paired_column, scanned.rule)
    name = source_name(part, None, where)
    return ParquetRows(
        scanned.index,
        scanned.column,
        name,
        functions,
        scanned.columns,
        config.shuffle_window,
        retry,
        scanned.recorded,
    )


def _open_unlabeled_table(
    config: UnlabeledSource,
    like: LabeledRows,
    spec: InputSpec,
    dataset: Any,
    where: str,
    seed: int,
    loading: Loading | None,
    chosen: Int64Array | None = None,
) -> UnlabeledTable:
    needed = () if config.input else names_of(like.column)
    table, name, rule = open_table(config, dataset, where, needed, loading)
    column, columns, functions = _columns(config, table.features, like, spec, where, rule)
    view = raw_view(table, columns)
    if chosen is None:
        ids, notes = rows_used(config, table, like, seed, where, name)
    else:
        ids, notes = chosen, []
    rows = UnlabeledTable(view, column, name, ids, functions, tuple(notes), rule=rule)
    first = ids[:TRIED].tolist()
    try:
        found = functions.values(view[first]).values
        check_fit(found, spec, name, lambda line: describe_row(view, first[line]))
    except OSError as error:
        unread = describe_rows(view, first)
        raise DataError(f"{name}: cannot read {unread}: {one_line(error)}") from error
    return rows


def _open_sequential(
    part: UnlabeledSource,
    config: Unlabeled,
    like: LabeledRows,
    spec: InputSpec,
    dataset: Any,
    where: str,
    loading: Loading | None,
) -> SequentialRows:
    needed = () if part.input else names_of(like.column)
    stream, found = dataset, None
    if dataset is None:
        stream, found = load_files(part, where, True, needed, loading)
    rule = path_rule(part, loading, given=dataset is not None, files=found)
    files = RowFiles()
    name = source_name(part, dataset, where)
    most = (loading or Loading()).most_unpacked
    with unpacking(most):
        first = _first_table(stream, name, files)
    features = stream.features or known_features(first.schema)
    check_dialect(features, where)
    column, columns, functions = _columns(part, features, like, spec, where, rule)
    row_bytes = max(1, first.select(list(columns)).nbytes // first.num_rows)
    block_rows = max(1, (config.shuffle_window or _BLOCK_BYTES) // 2 // row_bytes)
    check_fit(functions.values(first).values, spec, name, files.describe)
    return SequentialRows(stream, column, name, functions, columns, block_rows, most, files)


def _first_table(stream: Any, name: str, files: RowFiles) -> Any:
    """Read the first rows of a stream as an Arrow table, and note which files they are of."""
    try:
        view = stream.with_format("arrow")
        if view._distributed is None:  # else whoever reads it refuses it
            view = view.shard(num_shards=1, index=0)  # a source of its own
            files.watch(view)
        first = next(iter(view.iter(batch_size=TRIED)), None)
    except Exception as error:
        cause = f"{one_line(error)}{dialect_hint(error)}"
        raise DataError(f"{name}: cannot read the first rows: {cause}") from error
    if first is None or not first.num_rows:
        raise DataError(f"{name}: holds no rows")
    return first


def _columns(
    config: UnlabeledSource,
    features: Any,
    like: LabeledRows,
    spec: InputSpec,
    where: str,
    rule: PathRule,
) -> tuple[Column, tuple[str, ...], RowFunctions]:
    """The input column, every column that is read, and the user's functions."""
    kind = kind_named(spec.kind)
    paired = kind.paired_columns(spec, features, where)
    found = config.input or same_input(like.column, features, where)
    column = like.kind.find_columns(features, found, where)
    check_order(column, like.column, where)
    kind.check_columns(spec, features, column, where)
    others = [known_column(features, name, f"{where}.columns") for name in config.columns]
    columns = tuple(dict.fromkeys([*names_of(column), *paired, *others]))
    return column, columns, row_functions(config, column, where, spec.paired_column, rule)


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
