"""Labels of many rows: read by one rank, in a byte or two a row, and asked about once a class."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hpdist.data.config import Labeled
from hpdist.data.decode import written
from hpdist.data.sources import classes, labels
from hpdist.data.sources.coded import CodedValues, coded
from hpdist.data.sources.labeled import LabeledRows, open_labeled
from hpdist.errors import DataError
from hpdist.tasks import DEFAULT_TASK
from tests.support.ranks import run_ranks

ROWS, CLASSES = 100_000, 500


def table(values: Any) -> datasets.Dataset:
    rows = range(len(values))
    return datasets.Dataset(pa.table({"value": pa.array(rows).cast(pa.float32()), "label": values}))


def opened(values: Any, **settings: Any) -> LabeledRows:
    config = Labeled.model_validate({"path": "memory", "input": ["value"], **settings})
    return open_labeled(config, 0, labels=DEFAULT_TASK, dataset=table(values))


SOME: dict[str, list[Any]] = {
    "integers": [3, 1, None, 3, -1, 1, 3, 1],
    "texts": ["b", "a", "", "b", None, "a", "b", "a"],
    "numbers": [2.0, 1.0, float("nan"), 2.0, None, 1.0, 2.0, 1.0],
    "bytes": [b"x", b"y", None, b"x", b"x", b"y", b"x", b"y"],
    "booleans": [True, False, None, True, True, False, True, False],
}


@pytest.mark.parametrize("kind", SOME)
def test_codes_read_as_the_values_do(kind: str) -> None:
    values = SOME[kind] * 4
    array = pa.chunked_array([pa.array(values[:5]), pa.array(values[5:])])
    found = coded(array)
    assert found is not None
    assert len(found) == len(values)
    assert [repr(value) for value in found] == [repr(value) for value in array.to_pylist()]
    assert repr(found[5]) == repr(values[5])
    assert [repr(one) for one in found[2:9]] == [repr(one) for one in values[2:9]]
    as_list, as_codes = (
        classes.StoredLabels(datasets.Value("string"), stored, "here", "here", "label", str)
        for stored in (array.to_pylist(), found)
    )
    assert classes.distinct(as_list.values) == classes.distinct(as_codes.values)
    marks = [classes.marked(stored.values, True) for stored in (as_list, as_codes)]
    assert marks[0].tolist() == marks[1].tolist()
    assert labels.marks_of(as_list, marks[0]) == labels.marks_of(as_codes, marks[0])
    names = classes.Classes(("a", "1", "x", "False"))
    assert (
        classes.number_labels(as_list, names).tolist()
        == classes.number_labels(as_codes, names).tolist()
    )


def test_a_column_of_nothing_but_differences_stays_a_list() -> None:
    assert coded(pa.chunked_array([pa.array(range(100))])) is None
    assert coded(pa.chunked_array([pa.array([[1], [2]] * 50)])) is None


def test_the_first_row_that_is_no_class_is_named() -> None:
    with pytest.raises(DataError, match=r"row 2 has the label 0\.5"):
        opened(pa.array([1.0, 2.0, 0.5, 2.0, 0.5] * 4))


def test_a_label_is_asked_about_once_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every row costs bytes, not objects: the list of integers alone would take 36 a row."""
    asked = 0

    def counted(value: Any, minus_one: bool = False) -> bool:
        nonlocal asked
        asked += 1
        return written.is_mark(value, minus_one)

    monkeypatch.setattr(classes, "is_mark", counted)
    values = pa.array(np.random.default_rng(0).integers(CLASSES, size=ROWS))
    rows = table(values)
    tracemalloc.start()
    stored = labels.read_labels(rows, "label", "data.labeled", "data.labeled")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(stored.values, CodedValues)
    assert held < 3 * ROWS
    found = opened(values, labels_per_class=20)
    assert np.bincount(found.labels).tolist() == [20] * CLASSES
    assert (np.diff(found.ids) > 0).all()
    assert np.asarray(values)[found.ids].tolist() == found.labels.tolist()
    assert asked <= 6 * CLASSES


def open_on_a_rank(folder: str) -> tuple[int, list[int], list[int]]:
    import torch.distributed as dist

    from hpdist.distributed.collectives import run_on_main

    dist.init_process_group("gloo")
    reads, read = [], labels.read_column

    def counted(table: Any, column: str, name: str) -> Any:
        reads.append(column)
        return read(table, column, name)

    labels.read_column = counted
    rows = datasets.Dataset.from_file(f"{folder}/rows.arrow")
    config = Labeled.model_validate({"path": "memory", "input": ["value"], "labels_per_class": 2})
    found = open_labeled(config, 0, labels=DEFAULT_TASK, dataset=rows, once=run_on_main)
    return len(reads), found.chosen, found.labels.tolist()


def test_one_rank_reads_the_labels_for_all(tmp_path: Path) -> None:
    values = [row % 5 for row in range(60)]
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "rows.arrow")) as writer:
        writer.write_table(
            pa.table({"value": pa.array(range(60)).cast(pa.float32()), "label": values})
        )
        writer.finalize()
    first, second = run_ranks(2, open_on_a_rank, str(tmp_path))
    assert (first[0], second[0]) == (1, 0)
    assert first[1:] == second[1:]
    assert sorted(first[2]) == sorted([*range(5)] * 2)
    assert first[2] == [row % 5 for row in first[1]]
