"""Sources without row counts: exactly once, alike on any number of ranks, resumable in a block."""

import itertools
import json
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpdist.data.stream.sequential import SequentialReader
from hpdist.errors import DataError
from tests.support.sequential_sources import (
    RANKS,
    SEED,
    flat,
    generator,
    json_lines,
    model,
    opened,
    pairs,
    quick,
    reader,
    source,
    values,
    walk,
)


@st.composite
def cases(draw):
    """Files of which some may be empty, and blocks and batches that need not divide anything."""
    shards = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any))
    block_rows = draw(st.integers(1, 15))
    batch = draw(st.integers(1, 20))
    steps = draw(st.integers(1, 3 * sum(shards) // batch + 2))
    return shards, block_rows, batch, steps


@pytest.mark.parametrize("kind", ["generator", "json", "csv"])
@quick
@given(case=cases(), more=st.integers(1, 4))
def test_every_row_once_an_epoch_and_a_resume_anywhere_is_the_same(kind, case, more):
    shards, block_rows, batch, steps = case
    if kind != "generator":
        shards = [rows or 1 for rows in shards]  # a file without rows has no columns
    rows = sum(shards)
    with tempfile.TemporaryDirectory() as folder:
        dataset = source(kind, Path(folder), shards)
        first = reader(dataset, block_rows)
        taken = flat(walk(first, batch, steps))
        expected = list(itertools.islice(model(rows, block_rows), (steps + more) * batch))
        assert taken == expected[: steps * batch]
        for epoch in range(steps * batch // rows):
            assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == [
                (epoch, row) for row in range(rows)
            ]
        assert first.rows == (rows if steps * batch >= rows else None)
        point = first.resume_point(steps * batch)
        second = reader(dataset, block_rows, point)
        assert second.rows in (None, rows)
        resumed = walk(second, batch, more, steps * batch)
        assert flat(resumed) == expected[steps * batch :]
        assert second.resume_point((steps + more) * batch)["epoch"] == expected[-1][0] or (
            (steps + more) * batch % rows == 0
        )
        first.close()
        second.close()


@settings(parent=quick, max_examples=10)
@given(case=cases(), at=st.data())
def test_global_batches_do_not_depend_on_the_ranks_nor_on_restarts_between(case, at):
    shards, block_rows, batch, steps = case
    rows = list(itertools.islice(model(sum(shards), block_rows), steps * batch))
    whole = [rows[step * batch : (step + 1) * batch] for step in range(steps)]
    stop = at.draw(st.integers(1, steps))
    dataset = generator(shards)
    for ranks in RANKS:
        before = [reader(dataset, block_rows) for _ in range(ranks)]
        shares = [walk(each, batch, stop, 0, rank, ranks) for rank, each in enumerate(before)]
        assert [flat(parts) for parts in zip(*shares, strict=True)] == whole[:stop]
        points = [each.resume_point(stop * batch) for each in before]
        assert all(point == points[0] for point in points)
        others = RANKS[(RANKS.index(ranks) + 1) % len(RANKS)]
        after = [reader(dataset, block_rows, points[0]) for _ in range(others)]
        shares = [
            walk(each, batch, steps - stop, stop * batch, rank, others)
            for rank, each in enumerate(after)
        ]
        assert [flat(parts) for parts in zip(*shares, strict=True)] == whole[stop:]
        for each in before + after:
            each.close()


@settings(parent=quick, max_examples=15)
@given(
    rows=st.integers(1, 60), block_rows=st.integers(1, 20), batch=st.integers(1, 25), n=st.data()
)
def test_where_to_resume_is_known_for_what_was_read_though_more_was(rows, block_rows, batch, n):
    """The loader reads ahead of the step that a checkpoint is of."""
    dataset = generator([rows // 2, rows - rows // 2])
    ahead = reader(dataset, block_rows)
    walk(ahead, batch, 12)
    steps = sorted(n.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3)))
    for step in steps:
        point = ahead.resume_point(step * batch)
        resumed = reader(dataset, block_rows, point)
        expected = list(itertools.islice(model(rows, block_rows), step * batch, (step + 2) * batch))
        assert flat(walk(resumed, batch, 2, step * batch)) == expected
        resumed.close()
    ahead.close()


def multi(name):
    """Sources that are more than files or generators."""
    plain = datasets.Dataset.from_dict(
        {"x": list(range(90)), "text": [f"row {row}" for row in range(90)]}
    ).to_iterable_dataset(num_shards=4)
    halves = [
        generator([10, 7]).remove_columns("other"),
        generator([40]).filter(lambda row: row["x"] >= 17).remove_columns("other"),
    ]
    return {
        "table": lambda: plain,
        "map": lambda: plain.map(lambda row: {"text": row["text"]}),
        "batched map": lambda: plain.map(dict, batched=True, batch_size=7),
        "arrow map": lambda: plain.with_format("arrow").map(
            lambda table: table, batched=True, batch_size=7
        ),
        "filter": lambda: plain.filter(lambda row: row["x"] < 71),
        "filter, arrow": lambda: plain.with_format("arrow").filter(
            lambda row: row["x"][0].as_py() < 71
        ),
        "concatenated": lambda: datasets.concatenate_datasets(halves),
        "take": lambda: plain.take(50),
        "columns": lambda: plain.rename_column("x", "y").rename_column("y", "x"),
        "cast": lambda: generator([20, 30]).cast_column("x", datasets.Value("int32")),
        "interleaved": lambda: datasets.interleave_datasets(
            halves, probabilities=[0.3, 0.7], seed=1, stopping_strategy="all_exhausted"
        ),
        "shuffled": lambda: plain.shuffle(seed=3, buffer_size=20),
    }[name]()


# Where `datasets` does not lead back to the same rows, the epoch is read again.
READ_AGAIN = {"shuffled"}
THREADED = {"interleaved"}  # read by threads of `datasets`, slowly; where it was need not be exact
KINDS = (
    "table",
    "map",
    "batched map",
    "arrow map",
    "filter",
    "filter, arrow",
    "concatenated",
    "take",
    "columns",
    "cast",
    "interleaved",
    "shuffled",
)


@pytest.mark.parametrize("name", KINDS)
def test_what_users_make_of_a_dataset_resumes_too(name, caplog):
    dataset = multi(name)
    tables = dataset.shard(num_shards=1, index=0).with_format("arrow").iter(10)
    in_order = [value for table in tables for value in table["x"].to_pylist()]
    expected = [(e, in_order[r]) for e, r in itertools.islice(model(len(in_order), 8), 15 * 13)]
    for steps in range(1, 14, 4 if name in THREADED else 1):
        first = reader(dataset, 8)
        taken = values(first, 13, steps, 0)
        second = reader(dataset, 8, first.resume_point(steps * 13))
        taken += values(second, 13, 15 - steps, steps * 13)
        assert taken == expected
        first.close()
        second.close()
    again = [record for record in caplog.records if "reading epoch" in record.message]
    assert name in THREADED or bool(again) == (name in READ_AGAIN), again


def test_resuming_makes_no_row_of_an_earlier_shard_again():
    log = []
    dataset = generator([100] * 10, log)
    first = reader(dataset, 50)
    walk(first, 64, 14)
    point = first.resume_point(13 * 64)  # row 832 lies in block 16: rows 800 to 849
    first.close()
    assert (point["block"], point["start"]) == (16, 800)
    assert len(json.dumps(point)) < 700
    log.clear()
    second = reader(dataset, 50, point)
    walk(second, 64, 1, 13 * 64)
    second.close()
    assert min(log) >= 700  # the block before ended with shard 7, at whose end the state is
    assert len(log) < 300


def test_resuming_opens_no_earlier_file(tmp_path):
    dataset = json_lines(tmp_path, [100] * 10)
    first = reader(dataset, 50)
    walk(first, 64, 14)
    point = first.resume_point(13 * 64)
    first.close()
    for number in range(6):
        (tmp_path / f"{number:03}.jsonl").write_text("no JSON\n")
    second = reader(opened("json", tmp_path / "*.jsonl"), 50, point)
    expected = list(itertools.islice(model(1000, 50), 13 * 64, 15 * 64))
    assert flat(walk(second, 64, 2, 13 * 64)) == expected
    second.close()


def test_the_order_is_the_same_for_ever():
    # Resuming depends on these numbers: they must not change with a release.
    short = reader(generator([10]), 4)
    assert pairs(short.read(6, 8, 0, 8)) == PINNED
    short.close()


def test_empty_slices_have_the_columns():
    few = reader(generator([10]), 4)
    for place in (0, 1):
        rows = few.read(0, 2, place, place)
        assert (len(rows), rows.table.num_rows, rows.table.column_names) == (0, 0, ["text", "x"])
    few.close()


def test_order_and_description():
    few = reader(generator([5, 5]), 4)
    assert few.order() == {"kind": "sequential", "seed": SEED, "block_rows": 4, "shards": 2}
    assert few.describe(17) == "row 17"
    assert few.resume_point(0) is None
    few.close()


def test_positions_must_not_decrease():
    few = reader(generator([100]), 4)
    walk(few, 10, 3)
    with pytest.raises(ValueError, match="position 10 was passed"):
        few.read(10, 10, 0, 10)
    few.resume_point(20)
    walk(few, 10, 1, 40)
    with pytest.raises(ValueError, match="position 4 was passed long ago"):
        few.resume_point(4)
    few.close()


def test_the_rows_of_an_epoch_are_known_when_its_last_one_is_used():
    few = reader(generator([24]), 8)
    few.read(0, 12, 0, 12)
    assert few.rows is None
    few.read(12, 12, 0, 12)
    assert few.rows == 24
    assert few.resume_point(24) == few.resume_point(31)
    assert few.resume_point(24)["rows"] == 24
    assert few.resume_point(23)["rows"] is None
    few.close()


def test_how_far_it_read_ahead_changes_nothing():
    """Ranks read ahead at their own pace, and must say the same."""
    few = reader(generator([24]), 8)
    few.prepare(0, 60, 0, 60)
    while few._blocks._blocks[-1:] == [] or few._blocks._blocks[-1].stop < 60:
        time.sleep(0.01)
    few.read(0, 12, 0, 12)
    assert few.rows is None
    assert few.resume_point(12)["rows"] is None
    few.read(12, 12, 0, 12)
    assert few.rows == 24
    few.close()


def test_memory_for_where_to_resume_is_bounded():
    many = reader(generator([900]), 1)
    walk(many, 2, 400)
    assert 500 < len(many._blocks._points) <= 2 * 256 + 8
    many.resume_point(790)
    walk(many, 2, 1, 800)
    assert len(many._blocks._points) <= 30
    assert len(many._blocks._blocks) <= 8
    many.close()


def test_arrays_and_images_come_through():
    features = datasets.Features(
        {"pixels": datasets.Array2D((2, 3), "uint8"), "image": datasets.Image()}
    )

    def make(parts):
        for row in range(9):
            yield {"pixels": np.full((2, 3), row, np.uint8), "image": {"bytes": bytes([row])}}

    dataset = datasets.IterableDataset.from_generator(
        make, features=features, gen_kwargs={"parts": [0, 1]}
    )
    read = SequentialReader(dataset, ["pixels", "image"], "pictures", 0, 4)
    rows = read.read(0, 18, 0, 18)
    assert sorted(rows.ids.tolist()) == sorted([*range(18)])
    assert [image["bytes"][0] for image in rows.table["image"].to_pylist()] == [
        row % 9 for row in rows.ids
    ]
    assert [np.asarray(p)[0][0] for p in rows.table["pixels"].to_pylist()] == [
        row % 9 for row in rows.ids
    ]
    read.close()


def test_blocks_of_several_inferred_types_are_given_one():
    def inferred(*values):
        dataset = datasets.IterableDataset.from_generator(lambda: ({"x": v} for v in values))
        return SequentialReader(dataset, ["x"], "mixed", 0, 2)

    mixed = inferred(1, 2, 2.5, 3.5)
    assert sorted(mixed.read(0, 4, 0, 4).table["x"].to_pylist()) == [1.0, 2.0, 2.5, 3.5]
    mixed.close()
    mixed = inferred(1, 2, "three", "four")
    with pytest.raises(DataError, match=r"mixed: rows near row . of epoch 0 are of another type"):
        mixed.read(0, 4, 0, 4)
    mixed.close()


def test_datasets_still_goes_on_from_a_loaded_state_in_the_next_epoch():
    dataset = generator([20])
    rows = iter(dataset)
    for _ in range(5):
        next(rows)
    dataset.load_state_dict(dataset.state_dict())
    assert len(list(dataset)) == 15
    assert len(list(dataset)) == 15, "mended upstream: an epoch needs no shard of its own"


PINNED = [(0, 6), (0, 4), (0, 9), (0, 8), (1, 0), (1, 3), (1, 1), (1, 2)]


@pytest.mark.parametrize("kind", ["json", "csv"])
@settings(parent=quick, max_examples=15)
@given(case=cases())
def test_a_row_is_named_by_its_file_also_after_a_resume(kind, case):
    shards, block_rows, batch, steps = case
    shards = [rows or 1 for rows in shards]  # a file without rows has no columns
    ends = list(itertools.accumulate(shards))
    with tempfile.TemporaryDirectory() as folder:
        ending = {"json": "jsonl", "csv": "csv"}[kind]

        def place(row):
            file = next(number for number, end in enumerate(ends) if row < end)
            within = row - ends[file] + shards[file]
            return f"row {row} ({folder}/{file:03}.{ending}, row {within})"

        dataset = source(kind, Path(folder), shards)
        point = None
        for start in (0, steps * batch):
            each = reader(dataset, block_rows, point)
            for position in range(start, start + steps * batch, batch):
                rows = each.read(position, batch, 0, batch)
                named = [each.describe(row) for row in rows.ids.tolist()]
                assert named == [place(row) for row in rows.ids.tolist()]
            point = each.resume_point(start + steps * batch)
            each.close()


def test_a_row_of_what_is_no_file_is_named_by_its_number():
    for dataset in (generator([5, 5]), multi("filter"), multi("map")):
        first = reader(dataset, 4)
        first.read(0, 8, 0, 8)
        assert first.describe(6) == "row 6"
        first.close()


def test_a_picture_of_a_folder_is_named_by_its_own_file(tmp_path):
    for number in range(7):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    dataset = opened("imagefolder", tmp_path / "*.png")
    point = None
    for start in (0, 4):
        each = SequentialReader(dataset, ["image"], "the set", SEED, 2, point)
        rows = each.read(start, 4, 0, 4)
        named = [each.describe(row) for row in rows.ids.tolist()]
        assert named == [f"row {row} ({tmp_path}/{row}.png)" for row in rows.ids.tolist()]
        point = each.resume_point(start + 4)
        each.close()
