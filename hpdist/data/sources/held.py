"""`datasets` builders that hold what they read to `data.loading.most_unpacked`.

Each looks at what a file claims before it does what its parent does: where `datasets` makes a table
of files, of this machine or downloaded, and where it streams them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen

from hpdist.data.files.retry import is_remote
from hpdist.data.files.unpacked import (
    FACTOR,
    SETTING,
    Counted,
    UnpackedError,
    check_unpacked,
    most_unpacked,
)
from hpdist.data.stream.bounded import TooLargeError, check_groups, plain_bytes
from hpdist.data.stream.claims import check_disjoint, group_claim
from hpdist.data.stream.ipc import check_batches
from hpdist.messages.redaction import redacted

_TAKEN = 8  # bytes that a row takes in every column, whatever it holds


def hold_parquet(path: str, groups: Sequence[int] | None, columns: Sequence[str] | None) -> None:
    """Raise UnpackedError where row groups of a file take more memory than they may.

    Those of `groups` are looked at, or all, and of their columns the ones that are read, or all.
    """
    with _random_access(path) as source:
        size = source.size()
        parquet = pq.ParquetFile(source, pre_buffer=False)
        metadata = parquet.metadata
        names = list(columns or parquet.schema_arrow.names)
        numbers = list(range(metadata.num_row_groups) if groups is None else groups)
        most = most_unpacked()
        try:
            _check_claims(metadata, numbers, names, size, most)
            total = check_groups(parquet, source, numbers, names, most, SETTING)
            check_unpacked(total, size, most)
        except (TooLargeError, UnpackedError, ValueError, LookupError, OverflowError) as error:
            raise _named(path, error) from None


def _check_claims(
    metadata: pq.FileMetaData, numbers: Sequence[int], names: Sequence[str], size: int, most: int
) -> None:
    """Check what the footer says, and that its rows by themselves fit."""
    leaves = [
        leaf
        for leaf in range(metadata.num_columns)
        if metadata.schema.column(leaf).path.partition(".")[0] in names
    ]
    claims = [group_claim(metadata, number, leaves, size) for number in numbers]
    check_disjoint([span for claim in claims for span in claim.spans])
    for number, claim in zip(numbers, claims, strict=True):
        taken = claim.rows * _TAKEN * max(1, len(leaves))
        if taken > max(most, FACTOR * claim.stored):
            raise TooLargeError(
                f"row group {number} has {claim.rows} rows in {claim.stored} bytes, which take "
                f"{taken} bytes of memory; if that is right, raise {SETTING}"
            )


def _random_access(path: str) -> Any:
    if is_remote(path) or "::" in path:
        return pa.PythonFile(xopen(path, "rb"), mode="r")
    return pa.OSFile(path)


def hold_footer(path: str, metadata: pq.FileMetaData, columns: Sequence[str]) -> None:
    """Raise UnpackedError where a footer claims what cannot be, or more rows than fit.

    Nothing of the row groups is read; whoever reads one holds it to its pages.
    """
    numbers = range(metadata.num_row_groups)
    try:
        _check_claims(metadata, numbers, columns, os.path.getsize(path), most_unpacked())
    except (TooLargeError, ValueError, LookupError, OverflowError) as error:
        raise _named(path, error) from None


class HeldParquet(Parquet):  # type: ignore[misc]
    """Parquet files whose pages are added up before they are read."""

    def _generate_tables(self, files: Sequence[str], row_groups_list: Sequence[Any]) -> Any:
        columns = self.config.columns
        for number, (path, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            hold_parquet(path, groups, columns)
            for place, (_, table) in enumerate(super()._generate_tables([path], [groups])):
                yield table_key(number, place), table


class HeldArrow(Arrow):  # type: ignore[misc]
    """Arrow files whose buffers are added up before they are decompressed."""

    def _generate_tables(self, files: Sequence[str]) -> Any:
        for number, path in enumerate(files):
            with _random_access(path) as source:
                try:
                    check_batches(source, most_unpacked())
                except (ValueError, UnpackedError) as error:
                    raise _named(path, error) from None
            for place, (_, table) in enumerate(super()._generate_tables([path])):
                yield table_key(number, place), table

    def _cast_table(self, pa_table: pa.Table) -> pa.Table:
        check_unpacked(plain_bytes(pa_table), pa_table.nbytes, most_unpacked())  # of dictionaries
        return super()._cast_table(pa_table)


class HeldTar(WebDataset):  # type: ignore[misc]
    """Tar files whose members are counted as they are read: one may be of holes alone."""

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Iterable[Any]) -> Iterator[Any]:
        yield from super()._get_pipeline_from_tar(
            tar_path, _counted_members(tar_path, tar_iterator)
        )


def _counted_members(
    path: str, members: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Counted]]:
    """Count the members of an archive together, or where its size is not known one by one."""
    stored = os.path.getsize(path) if os.path.isfile(path) else 0
    size = 0
    for name, file in members:
        member = Counted(file, lambda: stored, most_unpacked(), size)
        yield name, member
        size = member.size if stored else 0


def _named(path: str, error: Exception) -> UnpackedError:
    return UnpackedError(f"{redacted(path)} is not read: {' '.join(str(error).split())}")


HELD: dict[str, type] = {"parquet": HeldParquet, "arrow": HeldArrow, "webdataset": HeldTar}
"""By the names of builders of `datasets`: what is used in their place."""


def hold_builder(builder: Any) -> None:
    """Have a builder that `datasets` made do what the one in its place does."""
    for held in HELD.values():
        if type(builder) is held.__mro__[1]:
            builder.__class__ = held


def table_key(number: int, place: int) -> Any:
    """A table's key as this version of `datasets` has them."""
    kind = getattr(datasets.builder, "Key", None)
    return f"{number}_{place}" if kind is None else kind(number, place)
