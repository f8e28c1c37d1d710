"""What rank 0 finds of the files reaches every rank: row groups as bytes, once for each host."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from hpdist.data.sources.unlabeled import DatasetIndex, DatasetIndexes
from hpdist.distributed.collectives import gathered
from hpdist.errors import DataError
from hpdist.train.shared_index import _described, share_index
from tests.support.parquet_files import index_of, write_numbers
from tests.support.ranks import run_ranks


def _shared(paths: list[Path], folder: str) -> list[Any]:
    dist.init_process_group("gloo")
    tempfile.tempdir = folder

    def scan() -> DatasetIndex:
        index = index_of(paths, "train[10%:]")
        return [None, DatasetIndexes(index, "x", ("x",), None)]

    none, part = share_index(scan)
    assert none is None
    assert part is not None
    assert len(gathered(0)) == 3
    left = [path.name for path in Path(folder).glob("*")] if Path(folder).is_dir() else []
    index = part.index
    rows = index.rows
    places = [index.describe(row) for row in (30, 77, 210)]
    return [isinstance(rows, np.memmap), rows.tolist(), index.fingerprint, places, left]


@pytest.mark.parametrize("writable", [True, False])
def test_ranks_have_the_index_of_rank_0(tmp_path: Path, writable: bool) -> None:
    paths = write_numbers(tmp_path / "files", [[7, 30], [1, 2, 3], [90, 100]])
    folder = tmp_path / "temporary"
    if writable:
        folder.mkdir()
    first, *others = run_ranks(3, _shared, paths, str(folder))
    index = index_of(paths, "train[10%:]")
    mapped, rows, fingerprint, places, left = first
    assert others == [first, first]
    assert mapped is writable  # without a file every rank has a copy
    assert left == []  # the file has no name any more
    assert rows == index.rows.tolist()
    assert fingerprint == index.fingerprint
    assert places == [index.describe(row) for row in (30, 77, 210)]


def _failing() -> str:
    dist.init_process_group("gloo")

    def scan() -> DatasetIndex:
        raise DataError("no such files")

    with pytest.raises(DataError) as raised:
        share_index(scan)
    return str(raised.value)


def test_an_error_of_rank_0_is_raised_everywhere() -> None:
    assert run_ranks(2, _failing) == ["no such files"] * 2


def test_what_is_pickled_does_not_grow_with_the_row_groups(tmp_path: Path) -> None:
    sizes = []
    for groups in (2, 2000):
        index = index_of(write_numbers(tmp_path / str(groups), [[1] * groups]))
        described = _described(DatasetIndexes(index, "x", ("x",), None))
        sizes.append(len(pickle.dumps(described)))
    assert sizes[1] - sizes[0] < 100
