"""Parquet rows exactly once an epoch, alike on any number of ranks, against a plain model."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpdist.data.stream.index import Index
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.permute import permutation
from hpdist.data.stream.plan import Plan
from hpdist.errors import DataError
from tests.support.parquet_files import ids_of, index_of, write_numbers

RANKS = [1, 2, 3, 4, 6, 8, 12, 16]


def model_of_an_epoch(index: Index, plan: Plan, epoch: int) -> list[int]:
    """The epoch's ids in order, written down from the plan's description, row by row."""
    order = permutation(len(index.rows), plan.seed, 0x6E0, epoch)
    line = [(int(g), row) for g in order for row in range(int(index.rows[g]))]
    positions = range(epoch * len(line), (epoch + 1) * len(line))
    lanes, at = [], 0
    for lane in range(plan.lanes):
        length = sum(p % plan.lanes == lane for p in positions)
        part, at = line[at : at + length], at + length
        groups = list(dict.fromkeys(group for group, _ in part))
        mixed = []
        for number in range(-(-len(groups) // plan.groups_per_window)):
            first = number * plan.groups_per_window
            window = set(groups[first : first + plan.groups_per_window])
            rows = [row for row in part if row[0] in window]
            places = permutation(len(rows), plan.seed, 0x80, epoch, lane, number)
            mixed += [rows[place] for place in places]
        lanes.append(mixed)
    turns = [iter(lane) for lane in lanes]
    sequence = [next(turns[p % plan.lanes]) for p in positions]
    return [int(index.start[group]) + row for group, row in sequence]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int, int]:
    files = draw(
        st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=5), min_size=1, max_size=5)
    )
    if not any(files):
        files[0] = [draw(st.integers(1, 9))]
    rows = sum(map(sum, files))
    lanes = draw(st.integers(1, min(6, rows)))
    return files, lanes, draw(st.integers(1, 4)), draw(st.integers(1, 25)), draw(st.integers(0, 99))


@given(cases(), st.sampled_from(RANKS), st.integers(0, 12))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_global_batches_are_those_of_the_model_on_any_number_of_ranks(
    case: tuple[list[list[int]], int, int, int, int], ranks: int, restart: int
) -> None:
    files, lanes, window, batch, seed = case
    order = {"kind": "parquet", "lanes": lanes, "groups_per_window": window}
    with tempfile.TemporaryDirectory() as folder:
        index = index_of(write_numbers(Path(folder), files))
        plan = Plan(index.rows, seed, lanes, window)
        rows = plan.rows
        epochs = [model_of_an_epoch(index, plan, epoch) for epoch in range(4)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)  # the model is sound
        sequence = [row for epoch in epochs for row in epoch]
        reader = ParquetReader(index, ["x"], "data", seed, batch, order=order)
        position = 0
        for number in range(len(sequence) // batch):
            if number == restart:  # as after a kill: nothing is left but the position
                reader.close()
                reader = ParquetReader(index, ["x"], "data", seed, batch, order=reader.order())
            found = ids_of(reader, position, batch, ranks if number < restart else 1)
            wanted = sequence[position : position + batch]
            assert Counter(found) == Counter(wanted)
            expected = _by_lane(plan, position, batch, sequence)
            assert found == expected
            position += batch
        reader.close()


def _by_lane(plan: Plan, position: int, batch: int, sequence: list[int]) -> list[int]:
    """The next rows of the sequence, sorted by lane; within a lane they stay in order."""
    places = range(position, position + batch)
    return [sequence[p] for p in sorted(places, key=lambda p: p % plan.lanes)]


def test_readers_for_every_number_of_ranks_see_the_same(tmp_path: Path) -> None:
    index = index_of(write_numbers(tmp_path, [[7, 5], [11], [], [3, 3, 3], [20]]))
    batch = 48
    batches = []
    for ranks in RANKS:
        found: list[list[int]] = [[] for _ in range(10)]
        for rank in range(ranks):
            reader = ParquetReader(index, ["x"], "data", 3, batch)
            for number in range(10):
                found[number] += ids_of(reader, number * batch, batch, ranks, rank)
            reader.close()
        batches.append(found)
    assert all(found == batches[0] for found in batches)
    ids = [row for found in batches[0] for row in found]
    assert len(ids) == 480
    assert max(Counter(ids).values()) - min(Counter(ids).values()) <= 1  # 480 rows of 52


@pytest.mark.parametrize("rows", [1, 3])
def test_a_dataset_smaller_than_a_batch_comes_several_times_in_one(
    tmp_path: Path, rows: int
) -> None:
    index = index_of(write_numbers(tmp_path, [[rows]]))
    reader = ParquetReader(index, ["x"], "data", 0, 6)
    assert Counter(ids_of(reader, 0, 6, 2)) == dict.fromkeys(range(rows), 6 // rows)
    reader.close()


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.unlabeled: holds no rows"):
        index_of(write_numbers(tmp_path, [[], []]))


def test_slices_keep_the_ids(tmp_path: Path) -> None:
    paths = write_numbers(tmp_path, [[10, 10], [10]])
    index = index_of(paths, "train[20%:50%]")
    reader = ParquetReader(index, ["x"], "data", 0, 9)
    assert sorted(ids_of(reader, 0, 9)) == list(range(6, 15))
    reader.close()
    assert reader.describe(12) == f"{paths[0]}, row group 1, row 2"
    with pytest.raises(DataError, match="overlap or are out of order"):
        index_of(paths, "train[:50%]+train[40%:]")


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    index = index_of(write_numbers(tmp_path, [[10] * 10]))
    orders = []
    for seed in range(3):
        reader = ParquetReader(index, ["x"], "data", seed, 10)
        orders.append(ids_of(reader, 0, 100))
        reader.close()
    assert orders[0] != orders[1] != orders[2]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    paths = write_numbers(tmp_path / "a", [[5], [6]])
    first = index_of(paths)
    moved = [path.rename(tmp_path / path.name) for path in paths]
    assert index_of(moved).fingerprint == first.fingerprint
    assert index_of(moved[::-1]).fingerprint != first.fingerprint
    changed = index_of(write_numbers(tmp_path / "b", [[5], [7]]))
    assert changed.fingerprint != first.fingerprint
    assert changed.changes(first.record()) == (
        "train-00001.parquet was rewritten: 6 rows in "
        f"{first.files[1].version.size} bytes, now 7 in {changed.files[1].version.size}"
    )
    more = index_of(write_numbers(tmp_path / "c", [[5], [6], [1]]))
    assert more.changes(first.record()) == "train-00002.parquet is new"
    assert first.changes(more.record()) == "train-00002.parquet is gone"


def test_the_index_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))
    paths = write_numbers(tmp_path, [[5, 2], [6]])
    first = index_of(paths)
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    reads: list[str] = []
    monkeypatch.setattr(
        "hpdist.data.stream.footers.read_range", lambda path, *_: reads.append(path) or b""
    )
    again = index_of(paths)
    assert not reads
    assert again.fingerprint == first.fingerprint
    assert again.rows.tolist() == first.rows.tolist()
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))
    kept.write_bytes(kept.read_bytes()[:100])  # half-written: made anew, not believed
    assert index_of(paths).fingerprint == first.fingerprint


@pytest.mark.alone
def test_forty_thousand_row_groups_are_indexed_and_planned_in_seconds(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.parquet" for number in range(20)]
    schema = pa.schema({"x": pa.int64()})
    for path in paths:
        table = pa.table({"x": np.arange(2000)}, schema=schema)
        pq.write_table(table, path, row_group_size=1)
    start = time.perf_counter()
    for path in paths:
        pq.read_metadata(path)
    bare = time.perf_counter() - start
    start = time.perf_counter()
    index = index_of(paths)
    reader = ParquetReader(index, ["x"], "data", 0, 64)
    first = reader.read(0, 64, 0, 64)
    taken = time.perf_counter() - start
    reader.close()
    assert len(index.rows) == 40_000
    assert len(np.unique(first.ids)) == 64
    assert taken < 40 * bare  # about 10: a loop over rows, or a footer read per group, is far above


def test_64_rows_come_from_many_row_groups(tmp_path: Path) -> None:
    """Of 64 rows of a batch of 448, drawn at random, at least 48 lie in different row groups."""
    index = index_of(write_numbers(tmp_path, [[100] * 10] * 40))
    reader = ParquetReader(index, ["x"], "data", 0, 448)
    random = np.random.default_rng(0)
    distinct = []
    for number in range(20):
        ids = np.asarray(ids_of(reader, number * 448, 448))
        distinct.append(len(np.unique(random.choice(ids, 64, replace=False) // 100)))
    reader.close()
    assert np.mean(distinct) >= 48


def test_a_batch_may_span_a_window_of_64_bit_offsets_and_one_of_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(write_numbers(tmp_path, [[40], [3], [3], [40]]))
    order = {"kind": "parquet", "lanes": 1, "groups_per_window": 1}
    plain = ParquetReader(index, ["x"], "data", 0, 86, order=order)
    expected = ids_of(plain, 0, 86)
    plain.close()
    monkeypatch.setattr("hpdist.data.stream.wide.MOST_IN_32_BITS", 200)  # bytes: of 40 rows
    reader = ParquetReader(index, ["x"], "data", 0, 86, order=order)
    assert ids_of(reader, 0, 86) == expected
    reader.close()
