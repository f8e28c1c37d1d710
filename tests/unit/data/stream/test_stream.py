"""The order of the stream: exactly once, alike on any number of ranks, resumable."""

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch

from hpdist.data.batch import LabeledBatch
from hpdist.data.config import Labeled, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.data.stream.mixed import whole_weights
from hpdist.errors import DataError
from tests.support.labeled import open_labeled
from tests.support.parquet_files import write_numbers

ROWS, BATCH = 50, 16


def table(rows=ROWS):
    return datasets.Dataset.from_dict(
        {"x": [[float(row), 0.5] for row in range(rows)], "label": [row % 5 for row in range(rows)]}
    )


LABELED = open_labeled(Labeled(path="memory", input="x"), 0, dataset=table())
SPEC = input_spec(LABELED)


FOLDER = tempfile.TemporaryDirectory()
FILES = write_numbers(Path(FOLDER.name), [[9, 4], [13], [], [24]])  # ROWS of them


def unlabeled(kind, rows=ROWS, window=200, **settings):
    if kind == "parquet":
        files = [str(path) for path in FILES]
        config = Unlabeled(path="parquet", data_files=files, input="x", streaming=True, **settings)
        return open_unlabeled(config, LABELED, SPEC)
    data = table(rows) if kind == "table" else table(rows).to_iterable_dataset(num_shards=3)
    config = Unlabeled(path="memory", shuffle_window=window, **settings)
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


@pytest.fixture(params=["table", "stream", "parquet", "slots"])
def rows(request, monkeypatch):
    """The same rows in every kind of order; one that takes a large set is given to a small one."""
    if request.param == "slots":
        where = "hpdist.data.sources.unlabeled_rows.choose_slots"
        monkeypatch.setattr(where, lambda batch, *_: batch)
        return unlabeled("parquet")
    return unlabeled(request.param)


def epochs_of(batches):
    """The ids of each epoch; a batch may hold rows of two."""
    epochs = {}
    for batch in batches:
        for epoch, row in zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True):
            epochs.setdefault(epoch, []).append(row)
    return epochs


def test_every_row_once_per_epoch_in_another_order(rows):
    epochs = epochs_of(take(rows, 10)[0])  # 160 rows: three epochs and a bit
    assert list(epochs) == [0, 1, 2, 3]
    epochs = [epochs[number] for number in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != list(range(ROWS))


def test_ids_belong_to_their_inputs(rows):
    for batch in take(rows, 4)[0]:
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs[:, 0].tolist() == batch.ids.tolist()
        assert batch.valid is None
        assert batch.epochs.dtype == torch.int64


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
    for kind in ("table", "stream", "parquet"):
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


@pytest.mark.parametrize(
    ("key", "message"), [("seed", "seed 99"), ("rows", "not that of the saved")]
)
def test_another_sequence_is_refused_by_name(rows, key, message):
    stream = BatchStream(rows, BATCH, 0, 1, 0, SPEC)
    state = stream.state_dict()
    if key in state["order"]:
        with pytest.raises(DataError, match=message):
            stream.load_state_dict({**state, "order": {**state["order"], key: 99}})
    stream.close()


def test_another_batch_size_goes_on_where_the_last_one_stopped(rows):
    """Only rows are counted: none is lost or repeated within the epoch."""
    first, state = take(rows, 2, batch=7)
    rest, _ = take(rows, 4, batch=9, state=state)
    assert sorted(ids_of(first) + ids_of(rest)) == list(range(ROWS))


def test_a_state_is_small_and_plain():
    _, state = take(unlabeled("parquet"), 3)
    assert len(json.dumps(state)) < 300


def test_the_next_batch_can_be_waited_for_without_moving(rows):
    stream = BatchStream(rows, BATCH, 0, 1, 0, SPEC)
    stream.prefetch()
    stream.prefetch()
    assert stream.state_dict()["position"] == 0
    assert next(stream).ids.tolist() == take(rows, 1)[0][0].ids.tolist()
    stream.close()


def test_data_that_changed_is_refused_by_name(tmp_path):
    def opened():
        config = Unlabeled(path=str(tmp_path), input="x", streaming=True)
        return open_unlabeled(config, LABELED, SPEC)

    write_numbers(tmp_path, [[9], [4]])
    before = opened()
    _, state = take(before, 2)
    write_numbers(tmp_path, [[9], [4], [3]])
    after = dataclasses.replace(opened(), recorded=before.index.record())
    with pytest.raises(DataError, match=r"not that of the saved run: train-00002\.parquet is new"):
        take(after, 1, state=state)


def mixed(weights, **settings):
    files = [str(path) for path in FILES]
    part = {"path": "parquet", "data_files": files, "input": "x", "streaming": True}
    parts = [{**part, "weight": weight, **settings} for weight in weights]
    return open_unlabeled(Unlabeled(mix=parts), LABELED, SPEC)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.5, 0.2, 0.3)])
def test_mixed_sets_keep_their_proportions_and_their_epochs(weights):
    rows = mixed(weights)
    epochs = epochs_of(take(rows, 40, batch=10)[0])
    for number, weight in enumerate(weights):
        own = [[row for row in ids if row // ROWS == number] for ids in epochs.values()]
        assert sum(map(len, own)) == pytest.approx(400 * weight / sum(weights), abs=1)
        whole = range(ROWS * number, ROWS * (number + 1))
        *finished, last = filter(None, own)
        assert all(sorted(epoch) == list(whole) for epoch in finished)
        assert len(set(last)) == len(last)


@pytest.mark.parametrize("before", [1, 7])
def test_mixed_sets_resume_on_another_world_size(before):
    rows = mixed((2, 1))
    whole = ids_of(take(rows, before + 5)[0])
    _, state = take(rows, before, rank=1, world_size=4)
    shares = [take(rows, 5, rank, 2, state=state)[0] for rank in range(2)]
    resumed = [torch.cat([a.ids, b.ids]).tolist() for a, b in zip(*shares, strict=True)]
    assert [row for batch in resumed for row in batch] == whole[before * BATCH :]


def test_weights_become_small_whole_numbers():
    assert whole_weights([2, 2]) == [1, 1]
    assert whole_weights([0.5, 0.2, 0.3]) == [5, 2, 3]
    assert whole_weights([1, 1e-9]) == [1000, 1]


def only_even(row):
    return row["x"][0] % 2 == 0


def doubled(row):
    return {"x": [2 * row["x"][0], row["label"]]}


def fails(row):
    raise LookupError("no such thing")


def of_this_module(function):
    return f"python:{function.__module__}:{function.__name__}"


@pytest.mark.parametrize("kind", ["table", "stream", "parquet"])
def test_a_filter_masks_and_moves_no_row(kind):
    plain, _ = take(unlabeled(kind), 7)
    filtered, _ = take(unlabeled(kind, filter=of_this_module(only_even)), 7)
    for before, after in zip(plain, filtered, strict=True):
        assert after.ids.tolist() == before.ids.tolist()
        assert after.valid.tolist() == (before.ids % 2 == 0).tolist()
        assert (after.inputs[after.valid] == before.inputs[after.valid]).all()
        assert not after.bad  # left out on purpose


def test_a_map_sees_the_columns_it_asks_for_and_moves_no_row():
    rows = unlabeled("parquet", map=of_this_module(doubled), columns=["label"])
    for batch in take(rows, 4)[0]:
        assert batch.valid is None
        assert batch.inputs[:, 0].tolist() == (2 * batch.ids).tolist()
        assert batch.inputs[:, 1].tolist() == (batch.ids % 3).tolist()


def test_a_function_that_fails_makes_a_bad_row(tmp_path):
    with pytest.raises(DataError, match="filter or map failed: LookupError: no such thing"):
        unlabeled("parquet", map=of_this_module(fails))  # of all rows: told at the start


def test_each_part_of_a_mixture_has_its_own_functions():
    batch = take(mixed((1, 1), filter=of_this_module(only_even)), 1, batch=40)[0][0]
    assert batch.valid.tolist() == ((batch.ids % ROWS) % 2 == 0).tolist()


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
def test_undecodable_rows_are_masked_and_named(kind):
    batches, _ = take(broken(kind), 4)  # 64 rows of 50
    bad = [row for batch in batches for row in batch.bad]
    assert {row.id for row in bad} == {30}
    assert "its shape is 1, the first labelled row's is 2" in str(bad[0])
    for batch in batches:
        masked = batch.ids == 30
        assert (batch.valid is None) == (not masked.any())
        if batch.valid is not None:
            assert batch.valid.tolist() == (~masked).tolist()
            assert (batch.inputs[masked] == 0).all()
    assert sorted(ids_of(batches)[:ROWS]) == list(range(ROWS))  # no other row moved


def test_an_undecodable_labelled_row_is_an_error_every_time():
    values = [[float(row), 0.5] if row != 30 else [1.0] for row in range(ROWS)]
    data = datasets.Dataset.from_dict({"x": values, "label": [0] * ROWS})
    rows = open_labeled(Labeled(path="memory", input="x"), 0, dataset=data)
    stream = BatchStream(rows, BATCH, 0, 1, 0, SPEC)
    for _ in range(2):
        with pytest.raises(DataError, match=r"data.labeled .* row 30 cannot be decoded"):
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
    first, second = (BatchStream(source, 100, 0, 1, 0, SPEC) for _ in range(2))
    ids = next(first).ids.tolist()
    assert sorted(ids_of(islice(second, 6))) == list(range(600))
    assert sorted(ids + ids_of(islice(first, 5))) == list(range(600))
    first.close()
    second.close()


def test_datasets_still_loses_rows_between_two_readers():
    data = datasets.concatenate_datasets([table(300).to_iterable_dataset(num_shards=3)] * 2)
    first = iter(data)
    next(first)
    assert len(list(data)) == 600
    assert len(list(first)) < 599, "mended upstream: SequentialReader needs no shard of its own"


def test_close_and_collection_end_the_thread():
    def alive():
        # Not those of trainers that other tests have left open, which hold their run folders.
        ours = ("hpdist-data", "hpdist-parquet")
        return [t for t in threading.enumerate() if t.name.startswith(ours)]

    stream = BatchStream(unlabeled("table"), BATCH, 0, 1, 0, SPEC)
    next(stream)
    assert len(alive()) == 1
    stream.close()
    stream.close()
    assert not alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    for kind in ("stream", "parquet"):
        forgotten = BatchStream(unlabeled(kind), BATCH, 0, 1, 0, SPEC)
        next(forgotten)
        assert alive()
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
    ("kind", "last", "status"),
    [("table", "", 0), ("stream", "raise SystemExit(5)", 5), ("parquet", "", 0)],
)
def test_process_exits_promptly_without_close(kind, last, status, tmp_path):
    script = tmp_path / "run.py"
    folder = __file__.rpartition("/")[0]
    script.write_text(SCRIPT.format(folder=folder, kind=kind, last=last))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "delivered\n"
        assert process.wait(timeout=60) == status
