"""Labelled Parquet is read where it lies: rows as `datasets` gives them, and no copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources import labeled, parquet_table
from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.loading import load_files
from hpdist.data.sources.parquet_table import ParquetTable
from hpdist.errors import DataError
from tests.support.labeled import open_labeled
from tests.support.ranks import run_ranks

CLASSES, PER_GROUP, GROUPS = 8, 16, 40
WIDTH = 5_000  # numbers of a row


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_read() -> int:
    """What this process has asked the kernel for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def many_columns() -> datasets.Dataset:
    rows = range(90)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "sound": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=list("abcdefgh")),
            "integer": datasets.Value("int16"),
            "number": datasets.Value("float32"),
            "text": datasets.Value("string"),
            "long": datasets.Value("large_string"),
            "day": datasets.Value("date32"),
            "list": datasets.List(datasets.Value("float32")),
            "fixed": datasets.List(datasets.Value("int32"), length=3),
            "array": datasets.Array2D((2, 3), "float32"),
            "nested": {"a": datasets.Value("int64"), "b": [{"c": datasets.Value("string")}]},
        }
    )
    values: dict[str, list[Any]] = {
        "image": [{"bytes": bytes([row]) * 5, "path": f"{row}.png"} for row in rows],
        "sound": [{"bytes": bytes([row] * 3), "path": None} for row in rows],
        "label": [row % 8 for row in rows],
        "integer": [None if row % 7 == 0 else row for row in rows],
        "number": [row / 3 for row in rows],
        "text": [f"row {row}" for row in rows],
        "long": [f"row {row % 3}" for row in rows],
        "day": [np.datetime64(row, "D").item() for row in rows],
        "list": [[row] * (row % 4) for row in rows],
        "fixed": [[row, row, 1] for row in rows],
        "array": [np.full((2, 3), row, np.float32) for row in rows],
        "nested": [{"a": row, "b": [{"c": "x"}] * (row % 3)} for row in rows],
    }
    table = datasets.Dataset.from_dict(values, features=features)
    return table.cast_column("sound", datasets.Audio(decode=False))  # which only torchcodec writes


def written(folder: Path) -> Path:
    """Three files of row groups of several sizes, one of them without rows."""
    table, folder = many_columns(), folder / "set"
    folder.mkdir()
    sizes = {"train-0": (0, 40, 7), "train-1": (40, 40, 9), "train-2": (40, 90, 50)}
    for name, (start, stop, size) in sizes.items():
        part = table.select(range(start, stop)).with_format("arrow")[:]
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=size)
    part = table.select(range(30)).with_format("arrow")[:]
    pq.write_table(part, folder / "test-0.parquet", row_group_size=4)
    return folder


def both(settings: dict[str, Any]) -> tuple[ParquetTable, Any]:
    config = Labeled.model_validate(settings)
    table, _ = load_files(config, "data.labeled", False, in_place=True)
    assert isinstance(table, ParquetTable)
    return table, load_files(config, "data.labeled", False)[0]


def check_same(table: ParquetTable, copied: Any) -> None:
    """Every way of reading gives the same rows, columns and types."""
    expected = copied.with_format("arrow")
    assert table.features == copied.features
    assert table.column_names == copied.column_names
    assert len(table) == len(copied)
    for columns in (table.column_names, [name] if (name := table.column_names[-1]) else []):
        view, same = table.select_columns(columns), expected.select_columns(columns)
        assert view[:].schema.types == same[:].schema.types
        assert view[:].to_pylist() == same[:].to_pylist()
    places = np.random.default_rng(0).integers(len(table), size=60).tolist()  # some twice
    assert table[places].to_pylist() == expected[places].to_pylist()
    for low, high in ((0, 1), (3, 17), (len(table) - 2, len(table)), (5, 5)):
        assert table[low:high].to_pylist() == expected[low:high].to_pylist()
    chosen = np.unique(places)
    holding = table.holding(chosen)
    for _ in range(2):  # the second time from memory
        assert holding[places].to_pylist() == expected[places].to_pylist()
    assert holding[:4].to_pylist() == expected[:4].to_pylist()  # also rows that are not held
    with pytest.raises(IndexError):
        table[[len(table)]]


@pytest.mark.parametrize("split", ["train", "train[10%:60%]+test+train[:5]", "train[-30:]"])
def test_rows_are_those_of_datasets(tmp_path: Path, split: str) -> None:
    table, copied = both({"path": str(written(tmp_path)), "split": split, "label": "label"})
    check_same(table, copied)


def test_rows_of_unlike_files_are_those_of_datasets(tmp_path: Path) -> None:
    """Other types, orders and columns, empty row groups, and a column that folders name."""
    parts = {
        "kind=a/0": {"x": pa.array([1, 2, 3], pa.int32()), "label": ["u", "v", None]},
        "kind=b/1": {"label": ["w"] * 4, "x": pa.array(range(4), pa.int64()), "more": [1] * 4},
        "kind=b/2": {"x": pa.array([2.5, None]), "label": pa.array(["u", "u"]).dictionary_encode()},
    }
    for name, columns in parts.items():
        path = tmp_path / "set" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, pa.table(columns).schema) as writer:
            writer.write_table(pa.table(columns).slice(0, 0))
            writer.write_table(pa.table(columns), row_group_size=2)
    check_same(*both({"path": str(tmp_path / "set"), "label": "label"}))
    options = {"columns": ["label", "kind"]}
    check_same(*both({"path": str(tmp_path / "set"), "label": "label", "options": options}))


def test_a_filter_of_the_reader_stays_with_datasets(tmp_path: Path) -> None:
    settings = {"path": str(written(tmp_path)), "options": {"filters": [("integer", ">", 9)]}}
    table, _ = load_files(Labeled.model_validate(settings), "data.labeled", False, in_place=True)
    assert isinstance(table, datasets.Dataset)
    assert len(table) < 80


def pictures(folder: Path) -> Path:
    """Rows that no compression makes much smaller, in many row groups."""
    noise = np.random.default_rng(0)
    folder = folder / "pictures"
    folder.mkdir(parents=True)
    columns = {
        "x": datasets.List(datasets.Value("float32")),
        "label": datasets.ClassLabel(num_classes=CLASSES),
    }
    schema = datasets.Features(columns).arrow_schema
    with pq.ParquetWriter(folder / "train.parquet", schema, use_dictionary=["label"]) as writer:
        for group in range(GROUPS):
            rows = range(group * PER_GROUP, (group + 1) * PER_GROUP)
            values = list(noise.random((PER_GROUP, WIDTH), np.float32))
            labels = [row % CLASSES for row in rows]
            writer.write_table(pa.table({"x": values, "label": labels}, schema=schema))
    return folder


def opened(folder: Path, **settings: Any) -> LabeledRows:
    config = {"path": str(folder), "input": "x", "label": "label", **settings}
    return open_labeled(Labeled.model_validate(config), 0)


def test_labels_are_read_alone_and_then_the_row_groups_of_the_chosen_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, and a row group that was read is not read again."""
    monkeypatch.setattr(parquet_table, "_RECENT", 1)  # the row group read last
    folder = pictures(tmp_path)
    whole = bytes_in(folder)
    before = bytes_read()
    rows = opened(folder, labels_per_class=1)
    assert bytes_read() - before < whole / 20
    groups = np.unique(rows.ids // PER_GROUP)
    before = bytes_read()
    values = [rows.read(np.array([place]))[0] for place in (*range(CLASSES), *range(CLASSES))]
    read = bytes_read() - before
    assert len(groups) < GROUPS / 4
    assert 0.9 < read / (whole * len(groups) / GROUPS) < 1.2
    assert bytes_in(tmp_path / "cache") == 0
    stored = pq.read_table(folder / "train.parquet").column("x")
    expected = [stored[row].as_py() for row in rows.ids.tolist() * 2]
    assert [value.tolist() for value in values] == expected


def test_a_test_set_is_read_in_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_table, "_RECENT", 1)  # the row group read last
    folder = pictures(tmp_path)
    like = opened(folder, labels_per_class=1)
    spec = input_spec(like)
    test = open_test(LabelColumn.model_validate({"path": str(folder)}), like, spec)
    before = bytes_read()
    batches = evaluation_batches(test, spec, 24, 0, 1)
    seen = [row for batch, valid in batches for row in batch.ids[valid].tolist()]
    assert seen == list(range(PER_GROUP * GROUPS))
    assert bytes_read() - before < 1.1 * bytes_in(folder)
    assert bytes_in(tmp_path / "cache") == 0


def test_folders_of_pictures_are_not_copied(tmp_path: Path) -> None:
    """The cache of `datasets` holds their paths."""
    noise = np.random.default_rng(0)
    for row in range(8):
        path = tmp_path / "photos" / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (128, 128), np.uint8)).save(path)
    settings = {"path": str(tmp_path / "photos"), "labels_per_class": 2}
    rows = open_labeled(Labeled.model_validate(settings), 0)
    assert len(rows.read(np.arange(4))) == 4
    assert bytes_in(tmp_path / "photos") > 8 * 16_000
    assert 0 < bytes_in(tmp_path / "cache") < 16_000


@pytest.mark.parametrize(
    ("limit", "reason"), [("MOST_HELD", "rows in use take"), ("LARGEST_GROUP", "a row group of it")]
)
def test_what_is_too_large_to_hold_is_copied_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    folder = pictures(tmp_path)
    in_place = opened(folder, labels_per_class=1)
    assert not [note for note in in_place.notes if "copied" in note]
    monkeypatch.setattr(parquet_table, limit, 4 * WIDTH * CLASSES // 2)
    copied = opened(folder, labels_per_class=1)
    (note,) = [note for note in copied.notes if "copied into the cache" in note]
    assert reason in note
    assert bytes_in(tmp_path / "cache") > bytes_in(folder) / 2
    assert copied.chosen == in_place.chosen
    order = np.arange(CLASSES)[::-1]
    assert np.array_equal(copied.read(order), in_place.read(order))
    readers = [rows.reader(0, 4) for rows in (copied, in_place)]
    assert readers[0].order() == readers[1].order()  # so that a run of before goes on


def test_a_row_group_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    path = folder / "train.parquet"
    place = pq.read_metadata(path).row_group(3).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(64))
    rows = opened(folder, indices=[PER_GROUP, 3 * PER_GROUP + 2])
    assert len(rows.read(np.array([0]))) == 1
    with pytest.raises(DataError, match=rf"rows \[50\].*{path}, row 50"):
        rows.read(np.array([1]))


def opened_on_a_rank(folder: str) -> tuple[list[int], list[int], list[Any], int]:
    import torch.distributed as dist

    from hpdist.distributed.collectives import run_on_main
    from hpdist.tasks import DEFAULT_TASK

    dist.init_process_group("gloo")
    settings = {"path": folder, "input": "x", "label": "label", "labels_per_class": 2}
    before = bytes_read()
    rows = labeled.open_labeled(
        Labeled.model_validate(settings), 0, labels=DEFAULT_TASK, once=run_on_main
    )
    read = bytes_read() - before
    return rows.chosen, rows.labels.tolist(), [v.sum() for v in rows.read(np.arange(16))], read


def test_two_ranks_have_the_rows_of_one(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    rows = opened(folder, labels_per_class=2)
    for chosen, labels, sums, read in run_ranks(2, opened_on_a_rank, str(folder)):
        assert chosen == rows.chosen
        assert labels == rows.labels.tolist()
        assert sums == [value.sum() for value in rows.read(np.arange(16))]
        assert read < bytes_in(folder) / 20
