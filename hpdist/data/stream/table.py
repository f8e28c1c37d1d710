"""Reads the rows of a table, which any of can be had at any time, in an order that is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.files.row_names import describe_row, describe_rows
from hpdist.data.stream.permute import Int64Array, permuted
from hpdist.data.stream.reader import Rows
from hpdist.data.structures import Arrays, take_rows
from hpdist.errors import DataError

_SAMPLED = 16  # rows that the fingerprint looks at


class TableReader:
    """Rows of a map-style dataset, exactly once an epoch: epoch e is all of them, permuted.

    Args:
        dataset: A `datasets.Dataset` of the columns to read, in Arrow format.
        ids: [rows], which of its rows are used.
        labels: [rows, *], the labels of each, of labelled rows: an array, or arrays by name.
        name: Of the dataset, for messages.
        key: Chooses the order.
    """

    def __init__(
        self,
        dataset: Any,
        ids: Int64Array,
        labels: Arrays | None,
        name: str,
        key: tuple[int, ...],
    ) -> None:
        self._dataset = dataset
        self._ids = ids
        self._labels = labels
        self._name = name
        self._key = key

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self._ids)

    def order(self) -> dict[str, Any]:
        """The key, and a fingerprint of which rows there are and of a sample of them."""
        return {
            "kind": "table",
            "seed": self._key[0],
            "rows": self.rows,
            "fingerprint": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self._ids.astype(np.int64).tobytes())
        for array in self._labels.values() if isinstance(self._labels, Mapping) else [self._labels]:
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        sample = np.linspace(0, self.rows - 1, min(_SAMPLED, self.rows)).astype(np.int64)
        for row in self._take(self._ids[sample]).to_pylist():
            digest.update(repr(row).encode())
        return digest.hexdigest()[:32]

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch at `position`."""
        epochs, offsets = np.divmod(np.arange(position + start, position + stop), self.rows)
        places = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            places[here] = permuted(offsets[here], self.rows, *self._key, epoch)
        ids = self._ids[places]
        labels = None if self._labels is None else take_rows(self._labels, places)
        return Rows(self._take(ids), ids, epochs, labels=labels)

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Nothing: the table is at hand."""

    def resume_point(self, position: int) -> None:
        """Nothing: the position says it all."""
        return

    def describe(self, row: int) -> str:
        """Name the row of the split, and its file where that is known."""
        return describe_row(self._dataset, row)

    def close(self) -> None:
        """Nothing to let go of."""

    def _take(self, ids: Int64Array) -> pa.Table:
        try:
            return self._dataset[ids.tolist()]
        except Exception as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{self._name}: cannot read {describe_rows(self._dataset, ids.tolist())}: {cause}"
            ) from error
