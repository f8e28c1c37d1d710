"""Sources without row counts, readers of them, and what they should give."""

import itertools
import json

import datasets
from hypothesis import HealthCheck, settings

from hpdist.data.stream.blocks import ORDER
from hpdist.data.stream.permute import permutation
from hpdist.data.stream.sequential import SequentialReader

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
            for place in permutation(size, SEED, ORDER, epoch, block).tolist():
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


def values(reader, batch, steps, start):
    """(epoch, value) of what is read; ids are not values where the user mixes the rows."""
    taken = []
    for position in range(start, start + steps * batch, batch):
        rows = reader.read(position, batch, 0, batch)
        taken += zip(rows.epochs.tolist(), rows.table["x"].to_pylist(), strict=True)
    return taken
