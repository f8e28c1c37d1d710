"""The stream against raw Arrow and `datasets`: rate, resuming, mixing, and what a step waits for.

    python -m tests.benchmarks.stream [--parts rate mixing resume wait] [--rounds 9]

Files are made in a temporary folder: rows of about 1 KB of random bytes, stored as `datasets`
stores an Image column (plain, uncompressed), read undecoded from the page cache. All take turns,
round by round, and ratios are those of a round, so that they hold when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpdist.data.stream.index import Index
from hpdist.data.stream.parquet import ParquetReader
from tests.benchmarks import stream_resume, stream_wait
from tests.benchmarks.stream_files import COLUMN, index_of, spread, stream_of, write_shards

ROWS, SHARDS, GROUP = 64_867, 32, 250
RATE_ROWS = 4 * ROWS  # else each of 64 lanes has four row groups, two of which it shares
DRAWN = 64  # rows of a batch whose row groups are counted

Count = Callable[[], int]  # reads, and says how many rows


def reading(
    index: Index, batch: int, rank: int = 0, ranks: int = 1, lanes: int | None = None
) -> Count:
    """A rank's rows of as many epochs as make 2 of all rows, so that start and end weigh little."""
    order = None
    if lanes is not None:
        groups = -(-128 // lanes)
        order = {"kind": "parquet", "lanes": lanes, "groups_per_window": groups}

    def run() -> int:
        reader = ParquetReader(index, [COLUMN], "data.unlabeled", 0, batch, order=order)
        start, stop = rank * batch // ranks, (rank + 1) * batch // ranks
        found = 0
        for position in range(0, 2 * ranks * reader.rows, batch):
            found += len(reader.read(position, batch, start, stop))
            reader.prepare(position + batch, batch, start, stop)
        reader.close()
        return found

    return run


def raw(paths: Sequence[Path]) -> Count:
    """All rows, in the order of the files."""
    return lambda: sum(len(b) for path in paths for b in pq.ParquetFile(path).iter_batches())


def rate(folder: Path, rows: int, rounds: int) -> None:
    """Rows per second of undecoded rows."""
    paths = write_shards(folder, rows, SHARDS, GROUP)
    index = index_of(paths)
    stream = stream_of(paths)
    arrow = stream.with_format("arrow")
    ours = {
        "4 lanes a rank of 64 in all, 448 rows of a batch of 7,168": reading(index, 7168, 5, 16),
        "4 lanes a rank of 64 in all, 64 rows of a batch of 1,024": reading(index, 1024, 5, 16),
        "2 lanes a rank of 64 in all, 224 rows of a batch of 7,168": reading(index, 7168, 11, 32),
        "4 lanes a rank of 16 in all, 448 rows of a batch of 1,792": reading(index, 1792, 1, 4, 16),
        "4 lanes in all, batch of 448, one rank": reading(index, 448, lanes=4),
        "64 lanes, batch of 448, one rank": reading(index, 448),
        "64 lanes, batch of 448, rank 5 of 16 (28 rows)": reading(index, 448, 5, 16),
        "64 lanes, batch of 64, one rank": reading(index, 64),
    }
    theirs: dict[str, Count] = {
        "Arrow `iter_batches`": raw(paths),
        "`datasets` shuffle(1000), rows": lambda: sum(1 for _ in stream.shuffle(0, None, 1000)),
        "`datasets` shuffle(1000), Arrow, iter(448)": lambda: sum(
            len(b) for b in arrow.shuffle(0, None, 1000).iter(448)
        ),
        "`datasets` Arrow, iter(64)": lambda: sum(len(b) for b in arrow.iter(64)),
        "`datasets` Arrow, iter(448)": lambda: sum(len(b) for b in arrow.iter(448)),
        "`datasets` Arrow, iter(1000)": lambda: sum(len(b) for b in arrow.iter(1000)),
    }
    clocks = taking_turns(theirs | ours, rounds)
    print(
        f"{rows:,} rows in {SHARDS} shards and {len(index.rows)} row groups: rows per second, and "
        f"how many times that of the others, median (quartiles) of {rounds} rounds.\n"
    )
    for clock, speeds in zip(["rows/s", "rows per second of CPU time"], clocks, strict=True):
        print(f"| | {clock} | {' | '.join(theirs)} |")
        print("|---|---|" + "---|" * len(theirs))
        for name in [*ours, *theirs]:
            ratios = [
                spread([a / b for a, b in zip(speeds[name], speeds[other], strict=True)])
                if name in ours
                else ""
                for other in theirs
            ]
            print(f"| {name} | {statistics.median(speeds[name]):,.0f} | {' | '.join(ratios)} |")
        print()


def taking_turns(
    runs: dict[str, Count], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Rows per second, and per second of CPU time, round by round; every other one backwards."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start, used = time.perf_counter(), time.process_time()
            rows = runs[name]()
            if number:  # the first one warms up
                wall[name].append(rows / (time.perf_counter() - start))
                cpu[name].append(rows / (time.process_time() - used))
    return wall, cpu


def mixing(folder: Path, rows: int) -> None:
    """Distinct row groups of 64 rows that are drawn from a global batch."""
    paths = write_shards(folder, rows, SHARDS, GROUP)
    index = index_of(paths)
    stream = stream_of(paths).with_format("arrow")
    groups = len(index.rows)
    ideal = groups * (1 - (1 - 1 / groups) ** DRAWN)
    batches = (64, 448)
    columns = " | ".join(f"batch of {batch}" for batch in batches)
    print(f"Distinct row groups of {DRAWN} rows of a global batch; of all rows: {ideal:.1f}.\n")
    print(f"| | {columns} |")
    print("|---|" + "---|" * len(batches))
    for budget in (None, 64 << 20, 16 << 20):
        found = [distinct(index, ids_of(index, batch, budget), batch) for batch in batches]
        name = "the default" if budget is None else f"{budget >> 20} MiB"
        print(f"| hpdist, shuffle_window: {name} | {' | '.join(f'{n:.1f}' for n in found)} |")
    for buffer in (1000, 10_000):
        ids = np.concatenate([_ids(batch) for batch in stream.shuffle(0, None, buffer).iter(448)])
        found = [distinct(index, ids, batch) for batch in batches]
        print(f"| `datasets` shuffle({buffer}) | {' | '.join(f'{n:.1f}' for n in found)} |")
    print()


def ids_of(index: Index, batch: int, budget: int | None) -> np.ndarray:
    """The ids of an epoch's whole global batches, in order."""
    reader = ParquetReader(index, [COLUMN], "data.unlabeled", 0, batch, budget=budget)
    found = []
    for position in range(0, reader.rows - batch + 1, batch):
        found.append(reader.read(position, batch, 0, batch).ids)
        reader.prepare(position + batch, batch, 0, batch)
    reader.close()
    return np.concatenate(found)


def _ids(table: pa.Table) -> np.ndarray:
    names = pa.compute.struct_field(table.column(COLUMN), "path").to_pylist()
    return np.asarray([int(name.partition(".")[0]) for name in names])


def distinct(index: Index, ids: np.ndarray, batch: int) -> float:
    """The mean over all global batches."""
    random = np.random.default_rng(0)
    groups = np.searchsorted(index.start, ids, side="right")
    batches = [groups[at : at + batch] for at in range(0, len(groups) - batch + 1, batch)]
    drawn = [random.choice(batch, DRAWN, replace=False) for batch in batches]
    return float(np.mean([len(np.unique(groups)) for groups in drawn]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["rate", "mixing", "resume", "wait"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, help="of the files that are read")
    parser.add_argument("--steps", type=int, default=60, help="of the training run")
    parser.add_argument("--cifar10", default="../shared/data/cifar10")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "rate":
                rate(Path(folder), options.rows or RATE_ROWS, options.rounds)
            elif part == "mixing":
                mixing(Path(folder), options.rows or ROWS)
            elif part == "resume":
                stream_resume.measure(Path(folder), options.rounds)
            else:
                stream_wait.measure(Path(folder), Path(options.cifar10), options.steps)
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[2]:.1f} over 15 minutes.")


if __name__ == "__main__":
    main()
