"""Every row of a labelled set exactly once, sharded over the ranks in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hpdist.data.batch import LabeledBatch
from hpdist.data.decode import InputSpec
from hpdist.data.sources import LabeledRows


def evaluation_batches(
    rows: LabeledRows, spec: InputSpec, batch: int, rank: int, world_size: int
) -> Iterator[tuple[LabeledBatch, Tensor]]:
    """Iterate over this rank's rows, with `valid`, a bool tensor [batch], beside each batch.

    Every rank gets the same number of batches of the same size, at most `batch` rows, so that
    collectives in the model's forward match. The ragged end repeats row 0 with valid=False; over
    all ranks, every row stands exactly once with valid=True. Raises DataError for an undecodable
    row.
    """
    share = -(-len(rows) // world_size)  # rows per rank, rounded up
    size = min(batch, share)
    start = rank * share
    end = min(start + share, len(rows))
    for first in range(start, start + share, size):
        positions = np.arange(first, first + size)
        valid = positions < end
        positions[~valid] = 0
        ids, labels = rows.ids[positions], rows.labels[positions]
        inputs = spec.decode_rows(rows.read(positions), ids.tolist(), rows.name)
        yield (
            LabeledBatch(inputs, torch.from_numpy(labels), torch.from_numpy(ids)),
            torch.from_numpy(valid),
        )
