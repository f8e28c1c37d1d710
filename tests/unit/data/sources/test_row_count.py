"""How many unlabelled rows an algorithm is told of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpdist.data.sources.labeled import UnlabeledTable
from hpdist.data.sources.unlabeled_rows import MixedRows, ParquetRows, SequentialRows, row_count
from hpdist.data.stream.functions import RowFunctions

NONE: Any = None


def table(rows: int, keep: Any = None) -> UnlabeledTable:
    return UnlabeledTable(NONE, "x", "table", np.arange(rows), RowFunctions("x", keep))


def parquet(groups: list[int], keep: Any = None) -> ParquetRows:
    index: Any = SimpleNamespace(row_count=sum(groups))
    return ParquetRows(index, "x", "files", RowFunctions("x", keep), ("x",), None, NONE)


SEQUENTIAL = SequentialRows(NONE, "x", "lines", RowFunctions("x"), ("x",), 8, 1 << 20)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (table(7), 7),
        (parquet([3, 4, 5]), 12),
        (MixedRows((table(7), parquet([3, 4])), (1.0, 2.0), "mix"), 14),
        (table(7, keep=bool), None),
        (parquet([3], keep=bool), None),
        (MixedRows((table(7), parquet([3], keep=bool)), (1.0, 2.0), "mix"), None),
        (SEQUENTIAL, None),
    ],
)
def test_row_count(rows: Any, expected: int | None) -> None:
    assert row_count(rows) == expected
