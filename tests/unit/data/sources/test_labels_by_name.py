"""Labels that are arrays by name go through tables, streams and evaluation as single ones do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hpdist.data import structures
from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.held_out import evaluation_batches, look_through, refuse_unreadable
from hpdist.data.sources.labeled import LabeledRows, open_labeled, open_test
from hpdist.data.stream import BatchStream
from hpdist.errors import DataError
from tests.support.documents import files

ROWS = 23
NAMES: dict[str, Any] = {"__name__": "toy_ordinal"}
exec(compile(files()["toy_ordinal.py"], "toy_ordinal.py", "exec"), NAMES)
TASK = NAMES["Ordinal"]()


def table(rows: int = ROWS, shift: int = 0) -> datasets.Dataset:
    columns = {"x": [[float(row), 0.5] for row in range(rows)]}
    return datasets.Dataset.from_dict(
        columns | {"label": [10 * ((row + shift) % 4) for row in range(rows)]}
    )


def opened(**settings: Any) -> LabeledRows:
    config = Labeled(path="m", input="x", **settings)
    return open_labeled(config, 0, dataset=table(), labels=TASK)


def assert_labels(labels: Any, ids: torch.Tensor, shift: int = 0) -> None:
    ranks = (ids + shift) % 4
    assert list(labels) == ["rank", "at_least"]
    assert (labels["rank"].dtype, labels["at_least"].dtype) == (torch.int64, torch.float32)
    assert labels["rank"].tolist() == ranks.tolist()
    assert labels["at_least"].tolist() == [
        [float(rank >= step) for step in (1, 2, 3)] for rank in ranks.tolist()
    ]


def test_they_are_read_and_drawn_by_class() -> None:
    rows = opened(labels_per_class=2)
    assert isinstance(rows.labels, Mapping)
    assert rows.class_numbers is not None
    assert np.bincount(rows.class_numbers).tolist() == [2, 2, 2, 2]
    assert_labels(structures.from_arrays(rows.labels), torch.from_numpy(rows.ids))
    assert rows.classes.names == ("0", "10", "20", "30")


@pytest.mark.parametrize("world_size", [1, 2])
def test_streams_carry_them(world_size: int) -> None:
    rows = opened()
    spec = input_spec(rows)
    for rank in range(world_size):
        stream = BatchStream(rows, 6, rank, world_size, 0, spec)
        for batch in islice(stream, 9):
            assert_labels(batch.labels, batch.ids)
            assert batch.inputs[:, 0].tolist() == batch.ids.tolist()
        stream.close()


def test_the_order_of_a_stream_is_that_of_its_labels_too() -> None:
    order = [opened().reader(0, 6).order()]
    config = Labeled(path="m", input="x")
    other = open_labeled(config, 0, dataset=table(shift=1), labels=TASK)
    order += [other.reader(0, 6).order(), opened().reader(0, 6).order()]
    assert order[0] == order[2] != order[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_carries_them(world_size: int) -> None:
    like = opened()
    spec = input_spec(like)
    rows = open_test(LabelColumn(path="m"), like, spec, dataset=table(17, shift=2))
    seen = []
    for rank in range(world_size):
        for batch, valid in evaluation_batches(rows, spec, 4, rank, world_size):
            assert_labels(batch.labels, batch.ids, shift=2)
            seen += batch.ids[valid].tolist()
    assert sorted(seen) == list(range(17))


def test_a_row_that_cannot_be_decoded_is_named_with_its_class() -> None:
    rows = [{"x": [float(row), 0.5], "label": 10 * (row % 4)} for row in range(8)]
    rows[6]["x"] = [None, 0.5]
    config = Labeled(path="m", input="x")
    read = open_labeled(config, 0, dataset=datasets.Dataset.from_list(rows), labels=TASK)
    with pytest.raises(DataError, match=r"row 6 of class '20'"):
        refuse_unreadable(read, [look_through(read, input_spec(read))])


def test_rows_without_a_class_are_not_drawn_by_it() -> None:
    from hpdist.tasks import make_task

    config = Labeled(path="m", input="x", labels_per_class=2)
    with pytest.raises(DataError, match=r"labels_per_class: goes by the class of a row"):
        open_labeled(config, 0, dataset=table(), labels=make_task("regression"))
