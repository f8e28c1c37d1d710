"""Reads a row group within a bound of memory, whatever its file claims.

The headers of its pages are added up first, since Arrow makes room for what they say. Values that a
dictionary holds once and rows repeat are read as they are stored, counted, and only then repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_table
from hpdist.data.files.open import RemoteFile
from hpdist.data.stream.claims import chunk_span, most_bytes
from hpdist.data.stream.pages import BadPageError, pages


class TooLargeError(Exception):
    """A row group that takes more memory than it may."""


def read_within(
    parquet: pq.ParquetFile,
    source: Any,
    number: int,
    columns: Sequence[str],
    budget: int,
    setting: str = "shuffle_window",
) -> pa.Table:
    """Read columns of a row group from `source`, which `parquet` reads too.

    Raises TooLargeError, which names `setting`, where they take more than the budget and 16 times
    their bytes in the file, and what Arrow does.
    """
    group = _Group.of(parquet, source, number, columns, budget, setting)
    if group.at_most <= group.most:
        return parquet.read_row_group(number, columns=list(columns), use_threads=False)
    table = group.as_stored()
    group.check(plain_bytes(table))
    return plain_table(table)


def check_groups(
    parquet: pq.ParquetFile,
    source: Any,
    numbers: Sequence[int],
    columns: Sequence[str],
    budget: int,
    setting: str,
) -> int:
    """Hold every row group of `numbers` to a budget of memory, as `read_within` does.

    Returns the bytes that they take together, or more than the budget at once. Raises
    TooLargeError, which names the row group and `setting`, and what Arrow does.
    """
    total, unsure = 0, []
    for number in numbers:
        if not parquet.metadata.row_group(number).num_rows:
            continue  # its columns may begin anywhere
        group = _Group.of(parquet, source, number, columns, budget, setting)
        if group.at_most <= group.most:
            total += group.paged
            unsure += [group] if group.at_most > group.paged else []
        else:
            size = plain_bytes(group.as_stored())
            group.check(size)
            total += size
    if total + sum(group.at_most - group.paged for group in unsure) <= budget:
        return total
    # What dictionaries stand for is known at most, and only reading them tells it.
    return total + sum(plain_bytes(group.as_stored()) - group.paged for group in unsure)


@dataclass(frozen=True)
class _Group:
    """What the pages of a row group say of the columns that are read."""

    source: Any
    metadata: pq.FileMetaData
    number: int
    columns: Sequence[str]
    unsure: Sequence[str]
    """Paths of the columns whose values a dictionary holds."""
    paged: int
    """Bytes of its pages, uncompressed."""
    at_most: int
    """Bytes in memory, if each row had the longest value of its dictionary."""
    most: int
    """Bytes that it may take."""
    setting: str

    @staticmethod
    def of(
        parquet: pq.ParquetFile,
        source: Any,
        number: int,
        columns: Sequence[str],
        budget: int,
        setting: str,
    ) -> _Group:
        """Add up the pages. Raises TooLargeError where they alone are too large."""
        metadata = parquet.metadata
        group = metadata.row_group(number)
        leaves = [
            leaf
            for leaf in range(metadata.num_columns)
            if metadata.schema.column(leaf).path.partition(".")[0] in columns
        ]
        chunks = [group.column(leaf) for leaf in leaves]
        most = most_bytes(budget, sum(chunk.total_compressed_size for chunk in chunks))
        total, repeated, unsure = 0, 0, []
        for leaf, chunk in zip(leaves, chunks, strict=True):
            path = metadata.schema.column(leaf).path
            size, dictionary = _sizes(path, chunk, source)
            total += size
            if chunk.physical_type == "BYTE_ARRAY" and dictionary:
                repeated += chunk.num_values * dictionary
                unsure.append(path)
        found = _Group(
            source, metadata, number, columns, unsure, total, total + repeated, most, setting
        )
        found.check(total)
        return found

    def check(self, size: int) -> None:
        """Raise TooLargeError for more bytes than it may take."""
        if size > self.most:
            raise TooLargeError(
                f"row group {self.number} takes {size} bytes of memory or more, and may take "
                f"{self.most}; if that is right, raise {self.setting}"
            )

    def as_stored(self) -> pa.Table:
        """Read it with what dictionaries hold once held once."""
        parquet = pq.ParquetFile(
            self.source,
            metadata=self.metadata,
            read_dictionary=self.unsure,
            page_checksum_verification=True,
            pre_buffer=False,
        )
        return parquet.read_row_group(self.number, columns=list(self.columns), use_threads=False)


def _sizes(path: str, chunk: pq.ColumnChunkMetaData, source: Any) -> tuple[int, int]:
    """Add up a chunk's pages: their bytes uncompressed, and those of dictionaries among them."""
    start, end = chunk_span(chunk)
    if isinstance(source, RemoteFile):
        source.hold(start, end)  # Arrow reads the same bytes then
    total = dictionary = values = 0
    try:
        for page in pages(_reader(source), start, end):
            total += page.size
            if page.dictionary:
                dictionary += page.size
            else:
                values += page.values
    except BadPageError as error:
        raise pa.ArrowInvalid(f"column {path!r}: {error}") from error
    if values > chunk.num_values:
        raise pa.ArrowInvalid(
            f"column {path!r}: its pages hold {values} values, and its footer says "
            f"{chunk.num_values}"
        )
    return total, dictionary


def _reader(source: Any) -> Callable[[int, int], bytes]:
    def read(start: int, end: int) -> bytes:
        if isinstance(source, RemoteFile):
            source.seek(start)
            return source.read(end - start)
        data: bytes = source.read_at(end - start, start)
        if len(data) < end - start:  # it was cut off since it was opened
            raise OSError(f"File too short: {len(data)} bytes of {end - start} at {start}")
        return data

    return read


def plain_bytes(table: pa.Table) -> int:
    """Bytes of a table's values, with what is held once and repeated counted as often."""
    return sum(_plain_bytes(chunk) for column in table.columns for chunk in column.chunks)


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _plain_bytes(array: Any) -> int:
    """Bytes of an array's values, with what a dictionary holds counted as often as it is there."""
    if isinstance(array, pa.DictionaryArray):
        counts = pc.value_counts(array.indices)
        places, times = counts.field("values"), counts.field("counts")
        lengths = pc.binary_length(array.dictionary).cast(pa.int64()).take(places)
        return int(pc.sum(pc.multiply(lengths, times)).as_py() or 0)
    if _is_view(array.type):
        return int(pc.sum(pc.binary_length(array)).as_py() or 0) + 16 * len(array)
    if pa.types.is_struct(array.type):
        return sum(_plain_bytes(array.field(number)) for number in range(array.type.num_fields))
    if pa.types.is_nested(array.type) and hasattr(array, "values"):
        return _plain_bytes(array.values) + 8 * len(array)
    return int(array.nbytes)
