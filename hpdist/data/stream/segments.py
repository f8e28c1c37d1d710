"""Rows of row groups in the types of the whole dataset, or nulls and why where they are damaged."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.files.open import FileChangedError, FileLostError, Retry
from hpdist.data.stream.bounded import TooLargeError
from hpdist.data.stream.index import Index
from hpdist.data.stream.plan import Segment
from hpdist.data.stream.row_groups import RowGroups
from hpdist.errors import DataError


class Segments:
    """Reads segments of a dataset's row groups, for several threads at once.

    Args:
        index: Of the dataset.
        columns: Which of them are read.
        name: Of the dataset, for messages.
        retry: How long a server may fail.
        stop: Ends every wait.
        budget: Bytes that a row group may take in memory, whatever it takes in the file.
    """

    def __init__(
        self,
        index: Index,
        columns: Sequence[str],
        name: str,
        retry: Retry,
        stop: threading.Event,
        budget: int,
    ) -> None:
        self._index = index
        self._name = name
        self._groups = RowGroups(columns, retry, stop, budget)
        schema = plain_schema(index.arrow_schema)
        fields = [schema.field(column) for column in columns]
        self.schema = pa.schema([pa.field(f.name, f.type, nullable=True) for f in fields])

    def whole(self, group: int) -> tuple[pa.Table, str | None]:
        """Read all used rows of a row group, as `read` does."""
        return self.read(Segment(group, 0, int(self._index.rows[group])))

    def read(self, segment: Segment) -> tuple[pa.Table, str | None]:
        """Read a segment's rows; or give nulls and why, where the file is damaged.

        Raises DataError where the file was rewritten since it was indexed.
        """
        file, number, first = self._index.locate(segment.group)
        first += segment.start
        count = segment.stop - segment.start
        try:
            group = self._groups.read(file, number)
            if len(group) < first + count:
                raise pa.ArrowInvalid(f"the row group holds {len(group)} rows")
            found = group if len(group) == count else group.slice(first, count)
            return (found if found.schema == self.schema else self._typed(found, file.path)), None
        except FileChangedError as error:
            raise DataError(
                f"{self._name}: {error}; a run needs the same data to its end: restore the file, "
                "or start a new run"
            ) from error
        except InterruptedError:
            raise
        except FileLostError as error:
            reason = error.reason
        except TooLargeError as error:
            reason = f"its row group is not read: {error}"
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            reason = f"its row group cannot be read: {' '.join(str(error).split())[:200]}"
        nulls = [pa.nulls(count, field.type) for field in self.schema]
        return pa.table(nulls, schema=self.schema), reason

    def close(self) -> None:
        """Let go of all files."""
        self._groups.close()

    def _typed(self, found: pa.Table, path: str) -> pa.Table:
        """A file's rows in the types of all files, with the columns that its folders name."""
        own = found.schema.names
        columns = [
            found.column(field.name).cast(field.type)
            if field.name in own
            else self._index.folders.constant(path, field, len(found))
            for field in self.schema
        ]
        return pa.table(columns, schema=self.schema)
