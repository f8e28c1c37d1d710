"""Evaluation sees every row exactly once, whatever the number of ranks."""

import datasets
import pytest
import torch

from hpdist.config import Labeled
from hpdist.data.evaluation import evaluation_batches
from hpdist.data.sources import input_spec, open_labeled


def rows_of(count):
    columns = {
        "x": [[float(row), 0.0] for row in range(count)],
        "label": [row % 3 for row in range(count)],
    }
    config = Labeled(path="memory", input="x")
    return open_labeled(config, 0, dataset=datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "batch"), [(50, 8), (48, 8), (3, 8), (1, 1), (9, 4)])
def test_every_row_is_valid_once_over_all_ranks(count, batch, world_size):
    rows = rows_of(count)
    spec = input_spec(rows)
    ranks = [
        list(evaluation_batches(rows, spec, batch, rank, world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(part) for batches in ranks for part, _ in batches}) == 1
    assert max(len(part) for batches in ranks for part, _ in batches) <= batch
    seen = []
    for part, valid in (pair for batches in ranks for pair in batches):
        assert valid.dtype == torch.bool
        assert valid.shape == part.ids.shape
        assert part.inputs[:, 0].tolist() == part.ids.tolist()
        assert (part.labels == part.ids % 3).all()
        seen += part.ids[valid].tolist()
    assert sorted(seen) == list(range(count))
