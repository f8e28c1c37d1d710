"""Files of one set that differ: in columns, types, order; without rows; with columns in folders."""

import decimal
import json
import uuid

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from hpdist.data.config import LabelColumn, Labeled, Loading, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.loading import load
from hpdist.data.sources.unlabeled import open_unlabeled, scan_metadata
from hpdist.data.sources.unlabeled_rows import ParquetRows, row_count
from hpdist.errors import DataError
from tests.support.labeled import open_labeled


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(cache))


def write(path, **columns):
    """Write rows as the kind of file that the path ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def labeled(folder, **settings):
    settings = {"input": ["a", "b"], "label": "label"} | settings
    return open_labeled(Labeled(path=str(folder), **settings), 0)


def rows_of(folder, like, streaming, **settings):
    """All rows of an unlabelled set, as a table or streamed, sorted."""
    settings = {"path": str(folder), "input": ["a", "b"], "streaming": streaming} | settings
    rows = open_unlabeled(Unlabeled(**settings), like, input_spec(like))
    reader = rows.reader(0, 4)
    try:
        count = row_count(rows) or 6
        read = reader.read(0, count, 0, count)
        assert not read.unread
        return sorted(value.tolist() for value in rows.values(read).values)
    finally:
        reader.close()


def like_of(tmp_path):
    write(tmp_path / "like" / "rows.parquet", a=[1.0, 2.0], b=[1.0, 2.0], label=["x", "y"])
    return labeled(tmp_path / "like")


ENDINGS = pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
STREAMING = pytest.mark.parametrize("streaming", [False, True])
SIX = [[float(row), float(-row)] for row in range(6)]


def part(rows, **more):
    return {"a": [float(r) for r in rows], "b": [float(-r) for r in rows], **more}


@ENDINGS
@STREAMING
def test_parts_without_rows_are_empty(tmp_path, ending, streaming):
    folder = tmp_path / "spark"
    empty = {
        "a": pa.array([], pa.null()),
        "b": pa.array([], pa.null()),
        "label": pa.array([], pa.null()),
    }
    for number in (0, 2, 5):
        write(folder / f"part-{number}.{ending}", **empty)
    if ending == "parquet":
        pq.ParquetWriter(folder / "part-6.parquet", pa.schema([("a", pa.float64())])).close()
    else:
        (folder / f"part-6.{ending}").write_text("")
    if ending == "jsonl":
        (folder / "part-7.jsonl").write_text("[]\n")
    for mark in ("_SUCCESS", "_metadata", ".part-1.parquet.crc"):
        (folder / mark).write_bytes(b"")
    write(folder / f"part-1.{ending}", **part(range(4), label=list("xyxy")))
    write(folder / f"part-3.{ending}", **part(range(4, 6), label=list("xy")))
    like = labeled(folder)
    assert like.labels.tolist() == [0, 1, 0, 1, 0, 1]
    kind = {"jsonl": "json"}.get(ending, ending)
    for settings in ({}, {"path": kind, "data_files": f"{folder}/*"}):
        assert rows_of(folder, like, streaming, **settings) == SIX
    test = open_test(LabelColumn(path=str(folder), input=["a", "b"]), like, input_spec(like))
    assert len(test) == 6


@STREAMING
def test_a_row_group_without_rows_is_empty(tmp_path, streaming):
    like = like_of(tmp_path)
    whole = pa.table(part(range(6)))
    (tmp_path / "set").mkdir()
    with pq.ParquetWriter(tmp_path / "set" / "0.parquet", whole.schema) as writer:
        for group in (whole.slice(0, 0), whole):
            writer.write_table(group)
    assert rows_of(tmp_path / "set", like, streaming) == SIX


@ENDINGS
@STREAMING
def test_a_set_of_empty_files_says_so(tmp_path, ending, streaming):
    like = like_of(tmp_path)
    for number in range(2):
        write(tmp_path / "none" / f"{number}.{ending}", a=pa.array([], pa.float64()))
    with pytest.raises(
        DataError, match=r"data.unlabeled \(.*\): holds no rows; its 2 files are all"
    ):
        rows_of(tmp_path / "none", like, streaming)


@ENDINGS
@STREAMING
def test_what_is_not_read_may_differ(tmp_path, ending, streaming):
    like = like_of(tmp_path)
    folder = tmp_path / "set"
    write(folder / f"0.{ending}", **part(range(2), note=["n", "m"], only=[1, 2]))
    write(folder / f"1.{ending}", b=[-2.0, -3.0], a=[2.0, 3.0], extra=["z", "z"])
    write(folder / f"2.{ending}", **part(range(4, 6), note=["o", "p"]))
    assert rows_of(folder, like, streaming) == SIX


@ENDINGS
def test_labelled_files_may_differ_too(tmp_path, ending):
    write(tmp_path / f"0.{ending}", **part(range(2), label=["x", "y"], extra=[1, 2]))
    write(tmp_path / f"1.{ending}", label=["z", "x"], b=[1.0, 2.0], a=[0.5, 1.5])
    rows = labeled(tmp_path)
    assert rows.classes.names == ("x", "y", "z")
    assert rows.read(np.asarray([2]))[0].tolist() == [0.5, 1.0]
    test = open_test(LabelColumn(path=str(tmp_path)), rows, input_spec(rows))
    assert test.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("ending", ["parquet", "csv"])  # keys of JSON are optional
@STREAMING
def test_a_column_that_is_needed_names_the_file_without_it(tmp_path, ending, streaming):
    like = like_of(tmp_path)
    write(tmp_path / "set" / f"0.{ending}", **part(range(2), c=[1, 2]))
    write(tmp_path / "set" / f"1.{ending}", a=[2.0, 3.0], c=[1, 2])
    for given in ({"input": ["a", "b"]}, {"input": None}):
        with pytest.raises(DataError, match=rf"'b'.*1\.{ending}|1\.{ending}.*'b' is missing"):
            rows_of(tmp_path / "set", like, streaming, **given)


@STREAMING
def test_widths_of_numbers_and_columns_of_nulls(tmp_path, streaming):
    like = like_of(tmp_path)
    folder = tmp_path / "set"
    write(folder / "0.parquet", a=pa.array([0, 1], pa.int32()), b=pa.array([0, -1], pa.float32()))
    write(folder / "1.parquet", a=pa.array([2, 3], pa.int64()), b=pa.array([-2, -3], pa.int64()))
    write(folder / "2.parquet", a=pa.array([4.0, 5.0]), b=pa.array([None, None], pa.null()))
    spec = input_spec(like, missing=True)
    config = Unlabeled(path=str(folder), input=["a", "b"], streaming=streaming)
    rows = open_unlabeled(config, like, spec)
    reader = rows.reader(0, 4)
    read = reader.read(0, 6, 0, 6)
    reader.close()
    found = sorted((v.tolist() for v in rows.values(read).values), key=lambda row: row[0])
    assert found[:4] == SIX[:4]
    assert [row[0] for row in found[4:]] == [4.0, 5.0]
    assert np.isnan([row[1] for row in found[4:]]).all()


@STREAMING
def test_types_that_do_not_go_together_name_both_files(tmp_path, streaming):
    like = like_of(tmp_path)
    write(tmp_path / "set" / "0.parquet", **part(range(2)))
    write(tmp_path / "set" / "1.parquet", a=["one", "two"], b=[1.0, 2.0])
    with pytest.raises(DataError, match=r"1\.parquet") as caught:
        rows_of(tmp_path / "set", like, streaming)
    assert "0.parquet" in str(caught.value)
    assert "'a'" in str(caught.value)
    assert "string" in str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_damaged_file_of_many_is_named(tmp_path, ending):
    write(tmp_path / f"0.{ending}", **part(range(2), label=["x", "y"]))
    damaged = {"csv": 'a,b,label\n1,2,"x\n1,2,3,4,5,6\n', "jsonl": '{"a": 1.0, "b": [\n'}[ending]
    (tmp_path / f"1.{ending}").write_text(damaged)
    with pytest.raises(DataError, match=rf"data.labeled \(.*1\.{ending} cannot be read: "):
        labeled(tmp_path)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_wrong_row_is_named_by_its_file(tmp_path, ending):
    like = like_of(tmp_path)
    folder = tmp_path / "test"
    write(folder / f"0.{ending}", **part(range(3), label=["x", "y", "x"], extra=[1, 2, 3]))
    write(folder / f"1.{ending}", **part(range(3, 6), label=["x", "zebra", "x"]))
    with pytest.raises(DataError, match=rf"row 4 \(.*/1\.{ending}, row 1\) has the label 'zebra'"):
        open_test(LabelColumn(path=str(folder)), like, input_spec(like))


def hive(folder):
    for year in (2020, 2021):
        for label in ("cat", "dog%2Fwolf"):
            path = folder / f"year={year}" / f"label={label}" / "part-0.parquet"
            write(path, a=[float(year - 2020)] * 2)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_types_that_datasets_lacks(tmp_path, streaming):
    ids = [uuid.UUID(int=number).bytes for number in (1, 2)]
    extended = pa.ExtensionArray.from_storage(pa.uuid(), pa.array(ids, pa.binary(16)))
    columns = {"a": [1.0, 2.0], "b": [1.0, 2.0], "label": extended, "id": extended}
    write(tmp_path / "rows.parquet", **columns)
    rows = labeled(tmp_path)
    assert rows.classes.names == tuple(f"0x{one.hex()}" for one in ids)
    unlabeled = open_unlabeled(
        Unlabeled(path=str(tmp_path), streaming=streaming), rows, input_spec(rows)
    )
    reader = unlabeled.reader(0, 2)
    values = unlabeled.values(reader.read(0, 2, 0, 2)).values
    reader.close()
    assert sorted(value.tolist() for value in values) == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_cannot_be_read_are_left_out(tmp_path, streaming):
    tags = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32()))
    columns = {"a": [1.0, 2.0], "b": [1.0, 2.0], "label": ["x", "y"]}
    for part in range(2):
        write(tmp_path / f"{part}.parquet", **columns, tags=tags)
    rows = labeled(tmp_path)
    assert rows.labels.tolist() == [0, 1, 0, 1]
    unlabeled = open_unlabeled(
        Unlabeled(path=str(tmp_path), streaming=streaming), rows, input_spec(rows)
    )
    reader = unlabeled.reader(0, 4)
    values = unlabeled.values(reader.read(0, 4, 0, 4)).values
    reader.close()
    assert sorted(value.tolist() for value in values) == [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 2
    message = r"the column 'tags' is map<.*> in .*0.parquet, which cannot be read"
    with pytest.raises(DataError, match=message):
        labeled(tmp_path, label="tags")


def test_a_file_of_no_known_kind_is_not_looked_for_on_the_hub(tmp_path):
    write(tmp_path / "rows.parquet", a=[1.0, 2.0], b=[1.0, 2.0], label=["x", "y"])
    (tmp_path / "rows.parquet").rename(tmp_path / "rows.dat")
    with pytest.raises(DataError, match=r"the kind of .*rows.dat' is not known .*parquet"):
        labeled(tmp_path / "rows.dat")
    assert labeled("parquet", data_files=str(tmp_path / "rows.dat")).labels.tolist() == [0, 1]
    feather.write_feather(
        pa.table({"a": [1.0], "b": [2.0], "label": ["x"]}), tmp_path / "f.feather"
    )
    assert labeled(tmp_path / "f.feather").classes.names == ("x",)


def test_folders_name_columns(tmp_path):
    rows = labeled(hive(tmp_path), input=["a", "year"])
    assert rows.classes.names == ("cat", "dog/wolf")
    assert rows.labels.tolist() == [0, 0, 1, 1] * 2
    values = [value.tolist() for value in rows.read(np.arange(8))]
    assert values == [[0.0, 2020.0]] * 4 + [[1.0, 2021.0]] * 4
    test = LabelColumn(path="parquet", data_files=f"{tmp_path}/year=*/*/*.parquet")
    assert open_test(test, rows, input_spec(rows)).labels.tolist() == rows.labels.tolist()
    sliced = labeled(tmp_path, input=["a", "year"], split="train[:25%]")
    assert sliced.labels.tolist() == [0, 0]


@STREAMING
def test_folders_name_columns_of_unlabelled_rows(tmp_path, streaming):
    like = labeled(hive(tmp_path), input=["a", "year"])
    found = rows_of(tmp_path, like, streaming, input=["a", "year"])
    assert found == [[0.0, 2020.0]] * 4 + [[1.0, 2021.0]] * 4
    one = rows_of(tmp_path, like, streaming, input=["a", "year"], split="train[6:]")
    assert one == [[1.0, 2021.0]] * 2


def test_an_index_tells_renamed_partitions_apart(tmp_path):
    like = labeled(hive(tmp_path), input=["a", "year"])
    config = Unlabeled(path=str(tmp_path), input=["a", "year"], streaming=True)

    def fingerprint():
        (found,) = scan_metadata(config, like, input_spec(like), Loading())
        return found.index.fingerprint

    before = fingerprint()
    assert fingerprint() == before  # from the cache
    (tmp_path / "year=2021").rename(tmp_path / "year=2022")
    assert fingerprint() != before


def test_conversion_keeps_what_folders_name(tmp_path):
    written = convert(Unlabeled(path=str(hive(tmp_path / "in")), input=["a"]), tmp_path / "out")
    table = pq.read_table(written.files[0])
    assert table.column("year").to_pylist() == [2020] * 4 + [2021] * 4
    assert set(table.column("label").to_pylist()) == {"cat", "dog/wolf"}


@STREAMING
def test_decimals_are_numbers(tmp_path, streaming):
    for kind, name in ((pa.decimal128(10, 2), "128"), (pa.decimal256(50, 2), "256")):
        folder = tmp_path / name
        values = pa.array([decimal.Decimal(f"{row}.25") for row in range(6)], kind)
        write(folder / "0.parquet", a=values, b=values, label=list("xyxyxy"))
        like = labeled(folder)
        assert rows_of(folder, like, streaming) == [[row + 0.25] * 2 for row in range(6)]


def test_all_and_sums_of_splits(tmp_path):
    for split, rows in (("train", range(3)), ("validation", range(3, 5)), ("test", range(5, 6))):
        write(tmp_path / f"{split}.parquet", **part(rows, label=["x"] * len(rows)))
    like = labeled(tmp_path, split="all")
    assert len(like) == 6
    for streaming in (False, True):
        for split in ("all", "train+validation+test"):
            assert rows_of(tmp_path, like, streaming, split=split) == SIX
        assert rows_of(tmp_path, like, streaming, split="train[:1]+test") == [SIX[0], SIX[5]]
        with pytest.raises(DataError, match=r'Unknown split "dev".*train, validation, test'):
            rows_of(tmp_path, like, streaming, split="dev")
    for name in ("train", "validation", "test"):
        (tmp_path / "csv").mkdir(exist_ok=True)
        table = pq.read_table(tmp_path / f"{name}.parquet")
        table.to_pandas().to_csv(tmp_path / "csv" / f"{name}.csv", index=False)
    assert rows_of(tmp_path / "csv", like, True, split="all") == SIX
    assert rows_of(tmp_path / "csv", like, False, split="all") == SIX
    with pytest.raises(DataError, match="a stream takes no slices"):
        rows_of(tmp_path / "csv", like, True, split="train[:1]")


def test_a_streamed_set_that_differs_keeps_its_promises(tmp_path):
    like = like_of(tmp_path)
    write(tmp_path / "set" / "0.parquet", **part(range(2), extra=[1, 2]))
    write(tmp_path / "set" / "1.parquet", b=[-2.0], a=[2.0])
    config = Unlabeled(path=str(tmp_path / "set"), input=["a", "b"], streaming=True)
    assert isinstance(open_unlabeled(config, like, input_spec(like)), ParquetRows)
    stream = load(config, "data.unlabeled", streaming=True)
    assert [row["a"] for row in stream] == [0.0, 1.0, 2.0]
