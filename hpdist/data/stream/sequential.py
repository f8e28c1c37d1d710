"""Rows of sources that can only be read from their beginning: JSON lines, CSV, tar, generators.

A source is read in blocks of so many rows, and the rows of a block are mixed with one another.
Blocks follow one another, and epochs follow without a gap; where an epoch ends is found by reading
it. Every rank reads all blocks and takes its own rows of a global batch, so that any number of
ranks sees the same batches. `datasets` says where a block begins, and goes on there.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.aliases import find_moved
from hpdist.data.files.retry import cause
from hpdist.data.files.unpacked import USUAL
from hpdist.data.stream.blocks import BlockSource
from hpdist.data.stream.blocks_ahead import BlocksAhead
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.row_files import RowFiles
from hpdist.errors import DataError
from hpdist.messages.redaction import redacted_text


class SequentialReader:
    """Reads a `datasets.IterableDataset` without row counts, one block after the other.

    What it promises less than a reader of indexed files: every rank reads everything, and rows are
    mixed within a block alone. Resuming reads again, and drops, what comes before the block in its
    file or shard, and at most the two before that one. Where the state of `datasets` does not lead
    back to the same rows (`shuffle` loses its buffer, for one), the whole epoch is read again up to
    the block, with a warning.

    Args:
        dataset: The whole of it, alike on every rank.
        columns: The columns to read.
        name: The setting and what it names, for messages.
        seed: Chooses the order within the blocks.
        block_rows: Rows of a block; the last one of an epoch is shorter.
        resume: A `resume_point` to go on from.
        files: Takes note of which file every row is of.
        most: Bytes that a compressed file may hold: `data.loading.most_unpacked`.

    Raises DataError for a dataset that is split by node.
    """

    def __init__(
        self,
        dataset: Any,
        columns: list[str],
        name: str,
        seed: int,
        block_rows: int,
        resume: dict[str, Any] | None = None,
        files: RowFiles | None = None,
        most: int = USUAL,
    ) -> None:
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}, but a block has at least one row")
        name = redacted_text(name)
        if dataset._distributed is not None:
            raise DataError(
                f"{name}: is split by node already; pass the whole dataset, without "
                "split_dataset_by_node: every rank is given its own rows of it"
            )
        self._name = name
        self._shards = dataset.num_shards
        self._seed = seed
        self._block_rows = block_rows
        self._rows: int | None = resume["rows"] if resume else None
        view = dataset.select_columns(columns).with_format("arrow")
        self._files = files or RowFiles()
        source = BlockSource(view, name, seed, block_rows, self._files, most)
        self._blocks = BlocksAhead(source.blocks(resume), resume)
        self._end = weakref.finalize(self, self._blocks.close)

    @property
    def rows(self) -> int | None:
        """Rows of an epoch; None until all rows of the first one have been read."""
        return self._rows

    def order(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        return {
            "kind": "sequential",
            "seed": self._seed,
            "block_rows": self._block_rows,
            "shards": self._shards,
        }

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch of `batch` rows that begins at `position`.

        Positions must not decrease. Raises DataError where the source fails, holds no rows, or has
        another number of them than in an earlier epoch.
        """
        end = position + batch
        blocks = self._blocks.reach(position, end)
        self._rows = next(block.rows for block in reversed(blocks) if block.start <= end)
        start, stop = position + start, position + stop
        taken = [block for block in blocks if block.start < stop and start < block.stop]
        picks = [block.picked(start, stop) for block in taken or blocks[:1]]
        try:
            # Without declared features, the types of each block are inferred.
            table = pa.concat_tables([pick.table for pick in picks], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{self._name}: rows near row {picks[0].ids[0]} of epoch {picks[0].epochs[0]} are "
                f"of another type than the next ones: {cause(error)}"
            ) from error
        ids = np.concatenate([pick.ids for pick in picks])
        return Rows(table, ids, np.concatenate([pick.epochs for pick in picks]))

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Begin to read ahead what that call of `read` will need; returns at once."""
        self._blocks.begin(position + batch)

    def resume_point(self, position: int) -> dict[str, Any] | None:
        """Where the block at `position` begins; None at the very beginning.

        For positions that do not decrease, at most 256 batches behind the newest one.
        """
        return self._blocks.point(position)

    def describe(self, row: int) -> str:
        """Name a row by its number, and where they are known by its file and its place there."""
        return self._files.describe(row)

    def close(self) -> None:
        """Stop reading ahead and let go of files; a read that hangs is left to end by itself."""
        self._end()


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
