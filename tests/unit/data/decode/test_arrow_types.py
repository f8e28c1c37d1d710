"""Columns in Arrow's other layouts: views, dictionaries, decimals, extension types."""

from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled, Source, Unlabeled
from hpdist.data.convert import Layout, convert
from hpdist.data.decode.arrow_types import plain_schema, plain_table
from hpdist.data.decode.stored_values import stored_values
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import ParquetRows, SequentialRows
from hpdist.data.stream import BatchStream
from tests.support.labeled import open_labeled

ROWS = 12


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), row, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png(row) for row in range(ROWS)]
STRUCT = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
VECTORS = [[float(row), 1.0] for row in range(ROWS)]
TENSORS = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), [2]), pa.array(VECTORS, pa.list_(pa.float32(), 2))
)
INPUTS: dict[str, pa.Array] = {
    "binary views": pa.array(PNGS, pa.binary_view()),
    "large binary": pa.array(PNGS, pa.large_binary()),
    "struct of views": pa.array([{"bytes": png, "path": None} for png in PNGS], STRUCT),
    "fixed size binary": pa.array(
        [png.ljust(max(map(len, PNGS)), b"\0") for png in PNGS], pa.binary(max(map(len, PNGS)))
    ),
    "decimals": pa.array(
        [[Decimal(row), Decimal("1.0")] for row in range(ROWS)], pa.list_(pa.decimal128(6, 2))
    ),
    "list views": pa.array(VECTORS, pa.list_view(pa.float64())),
    "large lists": pa.array(VECTORS, pa.large_list(pa.float32())),
    "tensors": TENSORS,
}
STREAMED_ONLY = ("list views", "tensors")  # `datasets` makes no table of these


def labels() -> pa.Array:
    return pa.array(["fig", "pear"] * (ROWS // 2), pa.string_view())


def like(kind: str) -> LabeledRows:
    """A labelled set of the same inputs, in the layout that everything knows."""
    image = kind in ("binary views", "large binary", "struct of views", "fixed size binary")
    values = pa.array(PNGS if image else VECTORS)
    data = datasets.Dataset(pa.table({"x": values, "label": labels()}))
    return open_labeled(Labeled(path="m", input="x"), 0, dataset=data)


def read(rows: Any, spec: Any) -> dict[int, float]:
    """The first number of every row of an epoch, by the row's id."""
    stream = BatchStream(rows, ROWS, 0, 1, 0, spec)
    batch = next(stream)
    stream.close()
    assert batch.bad == ()
    first = batch.inputs.reshape(ROWS, -1)[:, 0].tolist()
    return dict(zip(batch.ids.tolist(), first, strict=True))


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_layout_are_streamed(kind: str, tmp_path: Path) -> None:
    table = pa.table({"x": INPUTS[kind], "label": labels()})
    rows_of_group = ROWS if kind == "struct of views" else 5  # Arrow writes no slice of those
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=rows_of_group)
    first = like(kind)
    spec = input_spec(first)
    source = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "input": "x"}
    rows = open_unlabeled(Unlabeled(**source, streaming=True), first, spec)
    assert isinstance(rows, ParquetRows)
    expected = {row: float(row) for row in range(ROWS)}
    assert read(rows, spec) == expected
    if kind in STREAMED_ONLY:
        return
    assert read(open_unlabeled(Unlabeled(**source), first, spec), spec) == expected
    labeled = open_labeled(Labeled(**source), 0)
    assert labeled.classes.names == ("fig", "pear")
    assert open_test(LabelColumn(**source), labeled, input_spec(labeled)).labels.tolist() == [
        0,
        1,
    ] * (ROWS // 2)
    generic = datasets.load_dataset("parquet", data_files=source["data_files"], split="train")
    stream = open_unlabeled(
        Unlabeled(path="m", input="x"), first, spec, dataset=generic.to_iterable_dataset()
    )
    assert isinstance(stream, SequentialRows)
    assert read(stream, spec) == expected


def test_views_are_written_anew_by_convert(tmp_path: Path) -> None:
    table = pa.table({"x": INPUTS["struct of views"], "label": labels()})
    pq.write_table(table, tmp_path / "rows.parquet")
    source = Source(path="parquet", data_files=str(tmp_path / "rows.parquet"), input="x")
    layout = Layout(group_rows=5)
    written = convert(source, tmp_path / "out", layout=layout)
    found = pq.read_table(written.files[0])
    assert (written.rows, written.groups) == (ROWS, 3)
    assert [row["bytes"] for row in found["x"].to_pylist()] == PNGS
    assert found["label"].to_pylist() == labels().to_pylist()


def test_decimals_are_numbers_of_a_table(tmp_path: Path) -> None:
    price = pa.array([Decimal("0.25"), None, Decimal("-3.50")], pa.decimal128(9, 2))
    table = pa.table({"price": price, "n": [1, 2, 3], "label": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    source = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
    labeled = open_labeled(Labeled(**source, input=["price", "n"]), 0)
    spec = input_spec(labeled, missing=True)
    values = spec.decode_rows(labeled.read(np.arange(3)), [0, 1, 2], "x").numpy()
    np.testing.assert_array_equal(values, [[0.25, 1], [np.nan, 2], [-3.5, 3]])
    streamed = open_unlabeled(Unlabeled(**source, streaming=True), labeled, spec)
    assert isinstance(streamed, ParquetRows)


def test_columns_that_are_not_read_may_be_of_any_type(tmp_path: Path) -> None:
    ids = pa.array([bytes(16)] * ROWS, pa.uuid())
    prices = pa.array([1] * ROWS, pa.decimal64(9, 2))
    table = pa.table({"x": pa.array(VECTORS), "id": ids, "price": prices})
    pq.write_table(table, tmp_path / "rows.parquet")
    first = like("vectors")
    spec = input_spec(first)
    files = str(tmp_path / "rows.parquet")
    config = Unlabeled(path="parquet", data_files=files, input="x", streaming=True)
    assert read(open_unlabeled(config, first, spec), spec) == {row: row for row in range(ROWS)}


def test_files_may_differ_in_layout_alone(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.binary_view(), pa.large_binary())):
        part = pa.table({"x": pa.array(PNGS[number * 6 : number * 6 + 6], kind)})
        pq.write_table(part, tmp_path / f"{number}.parquet")
    first = like("binary views")
    spec = input_spec(first)
    files = str(tmp_path / "*.parquet")
    config = Unlabeled(path="parquet", data_files=files, input="x", streaming=True)
    assert read(open_unlabeled(config, first, spec), spec) == {row: row for row in range(ROWS)}


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        (pa.array(["a", None], pa.string_view()), pa.large_string()),
        (pa.array(["a", None]).dictionary_encode(), pa.string()),
        (pa.array([["a"], None], pa.list_(pa.string_view())), pa.list_(pa.large_string())),
        (pa.array([["a"], None], pa.list_(pa.string_view(), 1)), pa.list_(pa.large_string(), 1)),
        (pa.array([{"bytes": b"a", "path": "b"}, None], STRUCT),
         pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
        (pa.array([Decimal("1.5"), None], pa.decimal32(5, 2)), pa.decimal128(5, 2)),
        (pa.array([1, None]), pa.int64()),
    ],
)  # fmt: skip
def test_plain_types_hold_the_same_values(stored: pa.Array, plain: pa.DataType) -> None:
    table = pa.table({"x": stored})
    assert plain_schema(table.schema).field("x").type.equals(plain)
    assert plain_table(table)["x"].to_pylist() == stored.to_pylist()
    assert (plain_table(table) is table) == (stored.type == plain)


def test_lists_of_decimals_are_vectors() -> None:
    column = pa.chunked_array([pa.array([[Decimal("0.25")], None], pa.list_(pa.decimal128(4, 2)))])
    vector, none = stored_values(column)
    assert vector.dtype == np.float64
    assert vector.tolist() == [0.25]
    assert none is None
