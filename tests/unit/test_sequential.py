"""Sources without row counts: exactly once, alike on any number of ranks, resumable in a block."""

import gc
import itertools
import json
import logging
import tempfile
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpdist.data.stream.permute import permutation
from hpdist.data.stream.sequential import _ORDER, SequentialReader
from hpdist.errors import DataError

RANKS = (1, 2, 3, 4, 6, 8)
SEED = 5
quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def generator(shards, log=None):
    """A dataset of several shards; `log` gets every row that is made."""

    def make(parts):
        for part in parts:
            for row in part:
                if log is not None:
                    log.append(row)
                yield {"x": row, "text": f"row {row}", "other": 1.5}

    parts, first = [], 0
    for rows in shards:
        parts.append(list(range(first, first + rows)))
        first += rows
    features = datasets.Features({name: datasets.Value(kind) for name, kind in TYPES.items()})
    return datasets.IterableDataset.from_generator(
        make, features=features, gen_kwargs={"parts": parts}
    )


TYPES = {"x": "int64", "text": "string", "other": "float32"}


def json_lines(folder, shards, **options):
    first = 0
    for number, rows in enumerate(shards):
        lines = [
            json.dumps({"x": row, "text": f"row {row}", "other": 1.5})
            for row in range(first, first + rows)
        ]
        (folder / f"{number:03}.jsonl").write_text("".join(line + "\n" for line in lines))
        first += rows
    return opened("json", folder / "*.jsonl", **options)


def csv(folder, shards):
    first = 0
    for number, rows in enumerate(shards):
        lines = [f"{row},row {row},1.5\n" for row in range(first, first + rows)]
        (folder / f"{number:03}.csv").write_text("x,text,other\n" + "".join(lines))
        first += rows
    return opened("csv", folder / "*.csv")


def opened(builder, files, **options):
    return datasets.load_dataset(
        builder, data_files=str(files), split="train", streaming=True, **options
    )


def source(kind, folder, shards):
    if kind == "generator":
        return generator(shards)
    return json_lines(folder, shards) if kind == "json" else csv(folder, shards)


def reader(dataset, block_rows, resume=None):
    if resume is not None:
        resume = json.loads(json.dumps(resume))
    return SequentialReader(dataset, ["text", "x"], "the set", SEED, block_rows, resume)


def model(rows, block_rows):
    """The endless sequence of (epoch, row), written down as plainly as can be."""
    for epoch in itertools.count():
        for block, start in enumerate(range(0, rows, block_rows)):
            size = min(block_rows, rows - start)
            for place in permutation(size, SEED, _ORDER, epoch, block).tolist():
                yield epoch, start + place


def pairs(rows):
    """(epoch, row) of what was read, after a look at the values."""
    assert rows.table["x"].to_pylist() == rows.ids.tolist()
    assert rows.table["text"].to_pylist() == [f"row {row}" for row in rows.ids]
    assert rows.table.column_names == ["text", "x"]
    assert len(rows) == rows.table.num_rows
    return list(zip(rows.epochs.tolist(), rows.ids.tolist(), strict=True))


def walk(reader, batch, steps, start=0, rank=0, ranks=1):
    """The slices of `steps` global batches that one rank reads."""
    low, high = rank * batch // ranks, (rank + 1) * batch // ranks
    taken = []
    for step in range(steps):
        position = start + step * batch
        taken.append(pairs(reader.read(position, batch, low, high)))
        reader.prepare(position + batch, batch, low, high)
    return taken


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


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


def values(reader, batch, steps, start):
    """(epoch, value) of what is read; ids are not values where the user mixes the rows."""
    taken = []
    for position in range(start, start + steps * batch, batch):
        rows = reader.read(position, batch, 0, batch)
        taken += zip(rows.epochs.tolist(), rows.table["x"].to_pylist(), strict=True)
    return taken


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


def test_a_dataset_split_by_node_is_refused():
    dataset = split_dataset_by_node(generator([5, 5]), 0, 2)
    with pytest.raises(DataError, match=r"the set: is split by node .* pass the whole dataset"):
        reader(dataset, 4)


def test_a_source_that_fails_is_named_with_the_last_row_read_and_no_secret():
    def make():
        yield from ({"x": row} for row in range(25))
        raise OSError("GET https://me:pw@host/a.tar?token=abc failed")

    dataset = datasets.IterableDataset.from_generator(make)
    name = "data.unlabeled (tar, data_files 'https://host/a?token=abc')"
    failing = SequentialReader(dataset, ["x"], name, 0, 10)
    assert len(failing.read(0, 20, 0, 20)) == 20  # what comes before is not lost
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            failing.read(20, 5, 0, 5)
    assert str(caught.value) == (
        "data.unlabeled (tar, data_files 'https://host/a'): reading failed after row 19 of epoch "
        "0, in the next 10 rows: OSError: GET https://host/a.tar failed"
    )
    failing.close()


def test_a_damaged_file_is_an_error(tmp_path):
    dataset = json_lines(tmp_path, [10, 10])
    (tmp_path / "001.jsonl").write_text("{not JSON\n")
    damaged = reader(dataset, 5)
    assert len(damaged.read(0, 10, 0, 10)) == 10
    with pytest.raises(DataError, match=r"the set: reading failed after row 9 of epoch 0"):
        damaged.read(10, 5, 0, 5)
    damaged.close()


def changing(*epochs):
    """A dataset that has so many rows the first time, the second and so on."""
    left = list(epochs)

    def make():
        rows = left.pop(0)
        yield from ({"x": row, "text": f"row {row}"} for row in range(rows))

    return datasets.IterableDataset.from_generator(make)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ((0,), "the set: holds no rows$"),
        ((10, 0), "the set: holds no rows in epoch 1$"),
        ((10, 8), "the set: epoch 1 had 8 rows, an earlier one 10; .* must not change"),
        ((10, 30), "the set: epoch 1 had at least 12 rows, an earlier one 10"),
    ],
)
def test_an_epoch_of_other_rows_is_an_error(epochs, message):
    odd = SequentialReader(changing(*epochs), ["x"], "the set", 0, 4)
    with pytest.raises(DataError, match=message):
        values(odd, 5, 8, 0)
    odd.close()


@pytest.mark.parametrize("resumed_at", [3, 30, 51])
def test_a_dataset_that_changed_is_not_continued(resumed_at, caplog):
    def numbered(offset):
        def make():
            yield from ({"x": row + offset, "text": ""} for row in range(50))

        return datasets.IterableDataset.from_generator(make)

    first = reader(numbered(0), 4)
    for position in range(0, 60, 3):
        first.read(position, 3, 0, 3)
    point = first.resume_point(resumed_at)
    first.close()
    second = reader(numbered(1), 4, point)
    with pytest.raises(
        DataError, match=r"the set: cannot continue: the rows from row \d+ of epoch"
    ):
        second.read(resumed_at, 3, 0, 3)
    second.close()


def test_a_state_that_is_not_understood_costs_reading_alone(caplog):
    first = reader(generator([30, 30]), 4)
    walk(first, 7, 6)
    point = first.resume_point(35)
    first.close()
    for state in (None, {"epoch": 0, "examples_iterable": {"of another version": 1}}):
        second = reader(generator([30, 30]), 4, {**point, "state": state})
        expected = list(itertools.islice(model(60, 4), 35, 49))
        assert flat(walk(second, 7, 2, 35)) == expected
        second.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "reading epoch 0 again up to row 32" in caplog.records[0].message


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "hpdist-blocks"]


def test_close_and_collection_end_the_thread():
    closed = reader(generator([1000]), 4)
    walk(closed, 16, 2)
    assert len(alive()) == 1
    closed.close()
    closed.close()
    assert not alive()
    with pytest.raises(RuntimeError, match="closed"):
        closed.read(32, 16, 0, 16)
    forgotten = reader(generator([1000]), 4)
    walk(forgotten, 16, 2)
    del forgotten
    gc.collect()
    assert not alive()
    reader(generator([10]), 4).close()


def test_reading_ahead_goes_on_meanwhile_and_no_further_than_asked():
    log = []
    ahead = reader(generator([1000], log), 8)
    ahead.prepare(0, 16, 0, 16)
    time.sleep(0.3)
    assert 17 <= len(log) <= 32
    started = time.monotonic()
    ahead.read(0, 16, 0, 16)
    assert time.monotonic() - started < 0.1
    ahead.close()


def test_a_read_that_hangs_holds_nobody_up():
    held = threading.Event()

    def make():
        yield {"x": 0}
        held.wait(20)
        yield {"x": 1}

    hanging = SequentialReader(datasets.IterableDataset.from_generator(make), ["x"], "x", 0, 1)
    hanging.prepare(0, 1, 0, 1)
    time.sleep(0.1)
    started = time.monotonic()
    hanging.close()
    assert time.monotonic() - started < 4
    held.set()
    for thread in alive():
        thread.join(5)
    assert not alive()


def test_datasets_still_goes_on_from_a_loaded_state_in_the_next_epoch():
    dataset = generator([20])
    rows = iter(dataset)
    for _ in range(5):
        next(rows)
    dataset.load_state_dict(dataset.state_dict())
    assert len(list(dataset)) == 15
    assert len(list(dataset)) == 15, "mended upstream: an epoch needs no shard of its own"


PINNED = [(0, 6), (0, 4), (0, 9), (0, 8), (1, 0), (1, 3), (1, 1), (1, 2)]
