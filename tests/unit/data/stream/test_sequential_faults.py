"""Sources without row counts that fail, change or hang; and what is left when they are closed."""

import gc
import itertools
import logging
import threading
import time

import datasets
import pytest
from datasets.distributed import split_dataset_by_node

from hpdist.data.stream.sequential import SequentialReader
from hpdist.errors import DataError
from tests.support.sequential_sources import (
    flat,
    generator,
    json_lines,
    model,
    reader,
    values,
    walk,
)


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
        "data.unlabeled (tar, data_files 'https://host/a?REDACTED'): reading failed after row 19 "
        "of epoch 0, in the next 10 rows: OSError: GET https://REDACTED@host/a.tar?REDACTED failed"
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
    until = time.monotonic() + 60
    while len(log) < 17:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(log) <= 32
    ahead.read(0, 16, 0, 16)
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
    assert time.monotonic() - started < 15  # and not the 20 s that it hangs
    held.set()
    for thread in alive():
        thread.join(5)
    assert not alive()
