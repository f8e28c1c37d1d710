"""What a Parquet footer claims of its row groups, held to what can be, and to a budget of memory.

A footer is a few bytes that anyone can write. Nothing here or later makes room for as much as it
claims before the file itself bears it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq  # type: ignore[import-untyped]

ROW = 96
"""Bytes that a row of a window takes beside its values: its id, and its place in the order."""
LEAST = 64 << 20
"""Bytes that a row group may always take."""
FACTOR = 16
"""By how much its values may be compressed or repeated in the file where they take more."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_MOST_ROWS, _MOST_SIZE = 1 << 40, 1 << 50  # so that no sum over all row groups overflows
_START = 4  # bytes, of the magic number
_END = 8  # the length of the footer, and the magic number again


@dataclass(frozen=True)
class GroupClaim:
    """What a footer says of the columns of a row group that are read."""

    rows: int
    size: int
    """Bytes that its rows take in memory, with dictionaries counted once."""
    stored: int
    """Bytes in the file."""
    spans: tuple[tuple[int, int], ...]
    """Where in the file each column's chunk begins and ends."""


def group_claim(
    metadata: pq.FileMetaData, number: int, leaves: Sequence[int], file_size: int
) -> GroupClaim:
    """Check what a footer says of a row group. Raises ValueError for what cannot be."""
    group = metadata.row_group(number)
    rows, size, spans = group.num_rows, group.num_rows * ROW, []
    if not 0 <= rows <= _MOST_ROWS:
        raise ValueError(f"row group {number} has {rows} rows")
    for leaf in leaves if rows else ():
        chunk, kind = group.column(leaf), metadata.schema.column(leaf)
        values, held = chunk.num_values, chunk.total_uncompressed_size
        fits = values >= rows if kind.max_repetition_level else values == rows
        if not fits or held < 0:
            raise ValueError(
                f"row group {number}, column {kind.path!r}: it has {rows} rows, "
                f"{values} values and {held} bytes"
            )
        start, end = chunk_span(chunk)
        if not _START <= start <= end <= file_size - _END:
            raise ValueError(
                f"row group {number}, column {kind.path!r}: it lies at bytes {start} to "
                f"{end} of a file of {file_size}"
            )
        spans.append((start, end))
        width = kind.length if kind.physical_type == "FIXED_LEN_BYTE_ARRAY" else None
        size += values * (width or _WIDTHS.get(kind.physical_type, 0))
        size += 0 if width or kind.physical_type in _WIDTHS else held
    if size > _MOST_SIZE:
        raise ValueError(f"row group {number} holds {size} bytes")
    return GroupClaim(rows, size, sum(end - start for start, end in spans), tuple(spans))


def chunk_span(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where in the file a column chunk begins and ends."""
    start = chunk.data_page_offset
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    if dictionary:  # some writers say 0 for none
        start = min(start, dictionary)
    return start, start + chunk.total_compressed_size


def check_disjoint(spans: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError where column chunks overlap, so that few bytes would stand for many."""
    ordered = sorted(span for span in spans if span[0] < span[1])
    for (_, end), (start, _) in itertools.pairwise(ordered):
        if start < end:
            raise ValueError(f"two of its column chunks overlap, at byte {start}")


def most_bytes(budget: int, stored: int) -> int:
    """Bytes that a row group may take in memory, with a budget and so many bytes in the file."""
    return max(budget, LEAST, FACTOR * stored)
