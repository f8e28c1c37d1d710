"""Reads the footers of Parquet files, with one error for whatever they fail with."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.files.open import (
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    read_range,
    stat,
)
from hpdist.data.stream.claims import check_disjoint, group_claim
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

T = TypeVar("T")

MAGIC = b"PAR1"  # the last bytes of every Parquet file
_TAIL = 64 << 10  # bytes at a file's end that hold most footers whole


class Requests:
    """What is asked of the files, with one DataError for whatever they fail with."""

    def __init__(self, name: str, retry: Retry) -> None:
        self.name = name
        self.stop = threading.Event()
        self._retry = retry
        self._kept: dict[str, tuple[str, pq.FileMetaData]] = {}

    def version(self, path: str) -> FileVersion:
        """Ask for a file's size and tag."""
        return self._named(lambda: stat(path, self._retry, self.stop))

    def metadata(
        self, path: str, version: FileVersion, *, keep: bool = False
    ) -> tuple[str, pq.FileMetaData]:
        """Read a file's footer; also its SHA-256. With `keep` the next call need not read it."""
        found = self._kept.pop(path, None) or self._named(lambda: self._footer(path, version))
        if keep:
            self._kept[path] = found
        return found

    def footer(self, path: str, version: FileVersion, columns: Sequence[str]) -> Footer:
        """Read what the index needs of a file, and check what its footer claims."""
        digest, metadata = self.metadata(path, version)

        def checked() -> Footer:
            try:
                return Footer.of(digest, metadata, columns, version.size)
            except (ValueError, LookupError, OverflowError) as error:
                reason = f"is damaged, or no writer made it: {error}"
                raise FileLostError(path, reason) from error

        return self._named(checked)

    def _named(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (FileLostError, FileChangedError) as error:
            raise DataError(
                f"{self.name}: {error}; restore the file, or leave it out of data_files"
            ) from error

    def _footer(self, path: str, version: FileVersion) -> tuple[str, pq.FileMetaData]:
        size = version.size
        tail = self._read(path, max(0, size - _TAIL), version)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size and tail[-4:] == MAGIC:
            tail = self._read(path, size - length, version)
        try:
            metadata = pq.read_metadata(pa.BufferReader(tail))
            metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            raise FileLostError(
                path, f"is no Parquet file, or its end is damaged ({' '.join(str(error).split())})"
            ) from error
        return hashlib.sha256(tail[-length:]).hexdigest()[:32], metadata

    def _read(self, path: str, start: int, version: FileVersion) -> bytes:
        return read_range(path, start, version.size, self._retry, version, self.stop)


@dataclass(frozen=True)
class Footer:
    """What the index needs of a file: far less than all that its footer says."""

    digest: str
    types: dict[str, pa.DataType]  # of the columns that are read, as they are read
    rows: Int64Array  # [groups]
    sizes: Int64Array  # [groups], bytes in memory, by what the footer says
    stored: Int64Array  # [groups], bytes in the file

    @staticmethod
    def of(digest: str, metadata: pq.FileMetaData, columns: Sequence[str], size: int) -> Footer:
        """Take it from the whole footer of a file of `size` bytes.

        Raises ValueError where it claims what cannot be.
        """
        schema = plain_schema(metadata.schema.to_arrow_schema())
        leaves = [
            leaf
            for leaf in range(metadata.num_columns)
            if metadata.schema.column(leaf).path.partition(".")[0] in columns
        ]
        claims = [
            group_claim(metadata, number, leaves, size) for number in range(metadata.num_row_groups)
        ]
        check_disjoint([span for claim in claims for span in claim.spans])
        types = {c: schema.field(c).type for c in columns if c in schema.names}
        return Footer(
            digest,
            types,
            np.asarray([claim.rows for claim in claims], np.int64),
            np.asarray([claim.size for claim in claims], np.int64),
            np.asarray([claim.stored for claim in claims], np.int64),
        )
