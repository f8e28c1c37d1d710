"""The order of the stream: exactly once, alike on any number of ranks, resumable."""

import gc
import subprocess
import sys
import threading
import time
from itertools import islice

import datasets
import pytest
import torch

from hpdist.config import Labeled, Unlabeled
from hpdist.data.batch import LabeledBatch
from hpdist.data.sources import input_spec, open_labeled, open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.errors import DataError

ROWS, BATCH = 50, 16


def table(rows=ROWS):
    return datasets.Dataset.from_dict(
        {"x": [[float(row), 0.5] for row in range(rows)], "label": [row % 5 for row in range(rows)]}
    )


LABELED = open_labeled(Labeled(path="memory", input="x"), 0, dataset=table())
SPEC = input_spec(LABELED)


def unlabeled(kind, rows=ROWS, window=200):
    data = table(rows) if kind == "table" else table(rows).to_iterable_dataset(num_shards=3)
    config = Unlabeled(path="memory", shuffle_window=window)
    return open_unlabeled(config, LABELED, SPEC, dataset=data)


def take(rows, batches, rank=0, world_size=1, seed=0, state=None, batch=BATCH):
    stream = BatchStream(rows, batch, rank, world_size, seed, SPEC)
    if state:
        stream.load_state_dict(state)
    taken = list(islice(stream, batches))
    final = stream.state_dict()
    stream.close()
    return taken, final


def ids_of(batches):
    return torch.cat([batch.ids for batch in batches]).tolist()


@pytest.fixture(params=["table", "stream"])
def rows(request):
    return unlabeled(request.param)


def test_every_row_once_per_epoch_in_another_order(rows):
    ids = ids_of(take(rows, 10)[0])  # 160 rows: three epochs and a bit
    epochs = [ids[start : start + ROWS] for start in range(0, 150, ROWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != list(range(ROWS))


def test_ids_belong_to_their_inputs(rows):
    for batch in take(rows, 4)[0]:
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs[:, 0].tolist() == batch.ids.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_world_size(rows, world_size):
    alone = [batch.ids for batch in take(rows, 7)[0]]
    shares = [take(rows, 7, rank, world_size)[0] for rank in range(world_size)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.cat([part.ids for part in parts]).tolist() == whole.tolist()


def test_the_seed_decides_the_order(rows):
    assert ids_of(take(rows, 3)[0]) == ids_of(take(rows, 3)[0])
    assert ids_of(take(rows, 3)[0]) != ids_of(take(rows, 3, seed=1)[0])


@pytest.mark.parametrize("before", [1, 3, 4, 9, 25])
def test_resume_equals_the_uninterrupted_sequence_on_another_world_size(rows, before):
    whole = ids_of(take(rows, before + 5)[0])
    _, state = take(rows, before, rank=1, world_size=4)
    assert state["position"] == before * BATCH
    shares = [take(rows, 5, rank, 2, state=state)[0] for rank in range(2)]
    resumed = [torch.cat([a.ids, b.ids]).tolist() for a, b in zip(*shares, strict=True)]
    assert [row for batch in resumed for row in batch] == whole[before * BATCH :]


def test_resume_of_a_stream_reads_its_epoch_alone():
    passes = []

    def generate():
        passes.append(1)
        yield from ({"x": [float(row), 0.5]} for row in range(ROWS))

    data = datasets.IterableDataset.from_generator(generate)
    source = open_unlabeled(Unlabeled(path="memory"), LABELED, SPEC, dataset=data)
    _, state = take(source, 30, batch=10)  # six epochs
    passes.clear()
    stream = BatchStream(source, 10, 0, 1, 0, SPEC)
    stream.load_state_dict(state)
    assert (next(stream), stream.epoch)[1] == 6
    assert len(passes) <= 2  # the thread may have begun the next
    stream.close()


def test_constructor_takes_a_position(rows):
    stream = BatchStream(rows, BATCH, 0, 1, 0, SPEC, position=5 * BATCH)
    assert next(stream).ids.tolist() == take(rows, 6)[0][5].ids.tolist()
    stream.close()


def test_state_counts_delivered_batches_alone(rows):
    stream = BatchStream(rows, BATCH, 0, 1, 0, SPEC)
    next(stream)
    time.sleep(0.2)  # the thread runs ahead
    assert stream.state_dict()["position"] == BATCH
    stream.close()


def test_epoch_and_rows_are_known_when_the_last_row_is_used():
    for kind in ("table", "stream"):
        stream = BatchStream(unlabeled(kind), ROWS // 2, 0, 1, 0, SPEC)
        epochs = [(next(stream), stream.epoch)[1] for _ in range(5)]
        assert epochs == [0, 1, 1, 2, 2]
        assert stream.state_dict()["rows"] == ROWS
        stream.close()


def test_a_set_smaller_than_the_batch_cycles():
    few = open_labeled(Labeled(path="memory", input="x", labels_per_class=2), 0, dataset=table())
    batches, _ = take(few, 5)
    ids = ids_of(batches)
    assert [sorted(ids[i : i + 10]) for i in range(0, 80, 10)] == [few.chosen] * 8
    assert all(isinstance(batch, LabeledBatch) for batch in batches)
    assert all((batch.labels == batch.ids % 5).all() for batch in batches)


def test_two_sets_of_as_many_rows_are_walked_differently():
    assert ids_of(take(LABELED, 3)[0]) != ids_of(take(unlabeled("table"), 3)[0])


def test_more_ranks_than_rows_in_a_batch_leaves_some_empty():
    shares = [take(unlabeled("table"), 2, rank, 4, batch=2)[0] for rank in range(4)]
    assert [len(share[0]) for share in shares] == [0, 1, 0, 1]
    assert shares[0][0].inputs.shape == (0, 2)


def test_batches_narrow_and_move():
    batch = take(LABELED, 1)[0][0]
    part = batch.narrow(3, 4).to("cpu", non_blocking=True)
    assert len(part) == 4
    assert part.labels.tolist() == batch.labels[3:7].tolist()
    other = take(unlabeled("table"), 1)[0][0]
    assert other.narrow(3, 4).to("cpu").ids.tolist() == other.ids[3:7].tolist()


@pytest.mark.parametrize("key", ["seed", "rows", "global_batch"])
def test_another_sequence_is_refused_by_name(key):
    stream = BatchStream(unlabeled("table"), BATCH, 0, 1, 0, SPEC)
    with pytest.raises(DataError, match=f"{key} 99"):
        stream.load_state_dict({**stream.state_dict(), key: 99})


def test_a_stream_that_shrinks_between_epochs_is_noticed():
    _, state = take(unlabeled("stream"), 4)
    with pytest.raises(DataError, match=r"had 40 rows, an earlier one 50"):
        take(unlabeled("stream", rows=40), 4, state=state)


def broken(kind):
    data = table()
    values = data["x"][:]
    values[30] = [1.0]
    data = datasets.Dataset.from_dict({"x": values})
    return open_unlabeled(
        Unlabeled(path="memory"),
        LABELED,
        SPEC,
        dataset=data if kind == "table" else data.to_iterable_dataset(),
    )


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_undecodable_rows_are_named_by_the_consumer_every_time(kind):
    stream = BatchStream(broken(kind), BATCH, 0, 1, 0, SPEC)
    for _ in range(2):
        with pytest.raises(DataError, match=r"data.unlabeled .* row 30 cannot be decoded"):
            list(islice(stream, 4))
    stream.close()


def test_a_source_that_fails_midway_is_reported():
    def generate():
        yield from ({"x": [float(row), 0.5]} for row in range(ROWS * 10))
        raise OSError("the disk went away")

    data = datasets.IterableDataset.from_generator(generate)
    source = open_unlabeled(Unlabeled(path="memory", shuffle_window=1), LABELED, SPEC, dataset=data)
    stream = BatchStream(source, BATCH, 0, 1, 0, SPEC)
    with pytest.raises(DataError, match="the disk went away"):
        list(islice(stream, 40))
    stream.close()


def test_two_readers_of_one_stream_do_not_disturb_each_other():
    data = datasets.concatenate_datasets([table(300).to_iterable_dataset(num_shards=3)] * 2)
    source = open_unlabeled(Unlabeled(path="memory"), LABELED, SPEC, dataset=data)
    first = source.scan()
    ids = [next(first)[0]]
    assert [row for row, _ in source.scan()] == list(range(600))
    assert ids + [row for row, _ in first] == list(range(600))


def test_datasets_still_loses_rows_between_two_readers():
    data = datasets.concatenate_datasets([table(300).to_iterable_dataset(num_shards=3)] * 2)
    first = iter(data)
    next(first)
    assert len(list(data)) == 600
    assert len(list(first)) < 599, "mended upstream: StreamedRows.scan needs no shard of its own"


def test_close_and_collection_end_the_thread():
    def alive():
        return [thread for thread in threading.enumerate() if thread.name == "hpdist-data"]

    stream = BatchStream(unlabeled("table"), BATCH, 0, 1, 0, SPEC)
    next(stream)
    assert len(alive()) == 1
    stream.close()
    stream.close()
    assert not alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    forgotten = BatchStream(unlabeled("stream"), BATCH, 0, 1, 0, SPEC)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not alive()


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import test_stream
stream = test_stream.BatchStream(test_stream.unlabeled({kind!r}), 16, 0, 1, 0, test_stream.SPEC)
next(stream)
print("delivered", flush=True)
{last}
"""


@pytest.mark.parametrize(
    ("kind", "last", "status"), [("table", "", 0), ("stream", "raise SystemExit(5)", 5)]
)
def test_process_exits_promptly_without_close(kind, last, status, tmp_path):
    script = tmp_path / "run.py"
    folder = __file__.rpartition("/")[0]
    script.write_text(SCRIPT.format(folder=folder, kind=kind, last=last))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "delivered\n"
        started = time.monotonic()
        assert process.wait(timeout=20) == status
        assert time.monotonic() - started < 5
