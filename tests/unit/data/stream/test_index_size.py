"""An index and a plan of ten million row groups take little memory, and no list of the groups."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hpdist.data.files.open import FileVersion
from hpdist.data.stream.index import DataFile, Index, Parts
from hpdist.data.stream.slot_plan import SlotPlan
from tests.support.parquet_files import index_of, write_numbers

GROUPS = 10_000_000


def test_ten_million_row_groups_are_planned_within_a_hundred_megabytes() -> None:
    tracemalloc.start()
    try:
        rows = np.full(GROUPS, 100, np.uint32)
        rows[::7] = 93
        zero = np.zeros(1, np.int64)
        file = DataFile("a.parquet", FileVersion(1, "tag"), int(rows.sum()), "digest")
        index = Index((file,), b"", ("x",), rows, Parts(zero, zero, zero, zero, zero), 1.0, 1)
        plan = SlotPlan(index.rows, 0, 448)
        for group in plan.runs_at(np.arange(448), np.full(448, plan.rows // 448 // 2)).group:
            index.ids(int(group), 0, 1)
        assert index.row_count == plan.rows
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - rows.nbytes < 20_000_000  # bytes; a number of 8 bytes a group would be 80 MB


@pytest.mark.parametrize("split", ["train", "train[13%:91%]", "train[10%:40%]+train[60%:]"])
def test_places_follow_from_the_rows_of_the_groups(tmp_path: Path, split: str) -> None:
    """Against the arrays of every group's place, written down one by one."""
    sizes = np.random.default_rng(0).integers(0, 6, (5, 200)).tolist()
    paths = write_numbers(tmp_path, sizes)
    index = index_of(paths, split)
    whole = [
        (f"{path}, row group {number}, row {row}")
        for path, groups in zip(paths, sizes, strict=True)
        for number, rows in enumerate(groups)
        for row in range(rows)
    ]
    found = []
    for group, rows in enumerate(index.rows.tolist()):
        file, number, first = index.locate(group)
        ids = index.ids(group, 0, rows).tolist()
        found += ids
        names = [f"{file.path}, row group {number}, row {first + row}" for row in range(rows)]
        assert names == [whole[row] for row in ids]
        assert (index.number[group], index.first[group], index.start[group]) == (
            number,
            first,
            ids[0],
        )
        assert index.files[index.file[group]] == file
    assert found == sorted(set(found))
    assert len(found) == index.row_count
    assert max(found) < index.id_count
    picked = found[:: max(1, len(found) // 50)]
    assert [index.describe(row) for row in picked] == [whole[row] for row in picked]
    again = Index.from_header(index.header(), index.rows)
    assert again.fingerprint == index.fingerprint
    assert again.arrow_schema == index.arrow_schema
    assert again.record() == index.record()


def test_a_slice_may_end_in_a_row_group_and_go_on_with_the_next(tmp_path: Path) -> None:
    (path,) = write_numbers(tmp_path, [[4, 4]])
    index = index_of([path], "train[:2]+train[4:]")
    assert index.rows.tolist() == [2, 4]
    assert index.ids(1, 0, 4).tolist() == [4, 5, 6, 7]
    assert index.describe(5) == f"{path}, row group 1, row 1"
    assert index.id_count == 8
