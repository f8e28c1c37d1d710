"""The stream at scale: what ranks read for the rows they use, and what planning costs.

    python -m tests.benchmarks.scale_stream [--parts ranks reading index]

`ranks` follows the order of an epoch rank by rank, by arithmetic alone; `reading` reads real files
as a few ranks of many do; `index` measures an index and a plan of ten million row groups and more.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hpdist.data.files.open import FileVersion
from hpdist.data.stream.index import DataFile, Index, Parts
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.plan import Plan, choose_lanes
from hpdist.data.stream.reader import Reader
from hpdist.data.stream.slot_plan import SlotPlan, choose_slots
from hpdist.data.stream.slots import SlotReader
from tests.benchmarks.stream import raw, taking_turns
from tests.benchmarks.stream_files import COLUMN, index_of, spread, write_shards
from tests.support.reading import read_counts
from tests.support.slot_epoch import Epoch, uneven_groups

RANKS = [1, 2, 3, 5, 7, 8, 16, 64, 100, 256, 512, 1000, 1024, 4096]
BATCHES = [448, 1024, 4096, 16384]
DRAWN = 64
GROUP_BYTES = 2**18


def windows_ratio(batch: int, ranks: int) -> float:
    """The mean over ranks of whole lanes read for a share of their rows, as windows do it."""
    lanes, _ = choose_lanes(batch, 10**6, GROUP_BYTES, None)
    share = batch / lanes
    cuts = np.arange(ranks + 1) * batch // ranks
    touched = np.ceil(cuts[1:] / share) - np.floor(cuts[:-1] / share)
    return float(np.mean(touched * share / np.diff(cuts)))


def distinct(plan: SlotPlan, batch: int) -> float:
    """Distinct row groups of 64 rows drawn from a global batch, the mean of 20 batches."""
    random = np.random.default_rng(0)
    found = []
    for number in range(20):
        position = number * 7 * batch
        slots = np.sort(random.choice(batch, DRAWN, replace=False))
        lanes, turns = plan.places(position, batch, 0, batch)
        groups = plan.runs_at(lanes[slots], turns[slots]).group
        found.append(len(np.unique(groups)))
    return float(np.mean(found))


def ranks_part() -> None:
    """Rows read for each row used, for every number of ranks up to a quarter of the batch."""
    print("Rows read for each row used, mean (largest) over all ranks; before: 16 to 64 lanes.\n")
    print("| batch | row groups | ranks | before | now | row groups open on a rank |")
    print("|---|---|---|---|---|---|")
    mixed = []
    for batch in BATCHES:
        for count in (10 * batch, 25 * batch):
            rows = uneven_groups(count)
            lanes = choose_slots(batch, count, GROUP_BYTES, None)
            assert lanes is not None
            epoch = Epoch(SlotPlan(rows, 0, lanes))
            for ranks in [*(n for n in RANKS if n < batch // 4), batch // 4]:
                found = [epoch.ratio(batch, rank, ranks) for rank in range(ranks)]
                print(
                    f"| {batch:,} | {count:,} | {ranks:,} | {windows_ratio(batch, ranks):.2f} | "
                    f"{np.mean(found):.3f} ({max(found):.3f}) | {-(-lanes // ranks):,} |"
                )
            drawn = distinct(epoch.plan, batch)
            mixed.append(f"{drawn:.1f} at {batch:,} ({count:,} row groups)")
    print(f"\nDistinct row groups of {DRAWN} rows of a batch: {', '.join(mixed)}.\n")


def reading_part(folder: Path, rounds: int) -> None:
    """Read files as some of many ranks do: rows read, memory, and rate."""
    batch = 448
    paths = write_shards(folder, 10 * batch * 250 + 8000, 32, 250)
    index = index_of(paths)
    print(
        f"{index.row_count:,} rows of 1 KB in {len(index.rows):,} row groups, batch of {batch}.\n"
    )
    print("| ranks | rank | budget | epochs | rows read per used one | MB held | spilled |")
    print("|---|---|---|---|---|---|---|")
    monkeypatch = pytest.MonkeyPatch()
    for ranks, rank, budget in [
        (1, 0, None),
        (1, 0, 16 << 20),
        (7, 3, None),
        (64, 20, None),
        (100, 57, None),
        (112, 3, None),
    ]:
        reader = SlotReader(index, [COLUMN], "data", 0, batch, budget=budget)
        epochs = 1 if ranks == 1 else 5  # what is read ahead at the end counts as read
        held = 0
        with read_counts(monkeypatch) as counts:
            used = 0
            for _ in steps(reader, batch, rank, ranks, epochs):
                used += (rank + 1) * batch // ranks - rank * batch // ranks
                held = max(held, pa.total_allocated_bytes())
        spilled = f"{reader.spill.spilled / 1e6:.0f} MB of {index.bytes / 1e6:.0f}"
        limit = "512 MiB" if budget is None else f"{budget >> 20} MiB"
        ratio = counts.rows / used
        facts = [ranks, rank, limit, epochs, f"{ratio:.3f}", f"{held / 1e6:.0f}", spilled]
        print(f"| {' | '.join(map(str, facts))} |")
    runs = {
        "Arrow `iter_batches`": raw(paths),
        "slots, one rank": lambda: sum(
            steps(SlotReader(index, [COLUMN], "data", 0, batch), batch, 0, 1)
        ),
        "slots, one rank, 16 MiB": lambda: sum(
            steps(SlotReader(index, [COLUMN], "data", 0, batch, budget=16 << 20), batch, 0, 1)
        ),
        "windows, one rank": lambda: sum(
            steps(ParquetReader(index, [COLUMN], "data", 0, batch), batch, 0, 1)
        ),
    }
    wall, cpu = taking_turns(runs, rounds)
    print(f"\nRows against Arrow's, median (quartiles) of {rounds} rounds.\n")
    print("| | per second | per second of CPU time |\n|---|---|---|")
    arrow = "Arrow `iter_batches`"
    for name in list(runs)[1:]:
        cells = [
            spread([a / b for a, b in zip(speeds[name], speeds[arrow], strict=True)])
            for speeds in (wall, cpu)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def steps(reader: Reader, batch: int, rank: int, ranks: int, epochs: int = 1) -> Iterator[int]:
    """Read a rank's rows of some epochs; how many each batch gave."""
    start, stop = rank * batch // ranks, (rank + 1) * batch // ranks
    for position in range(0, epochs * (reader.rows or 0) - batch + 1, batch):
        rows = reader.read(position, batch, start, stop)
        reader.prepare(position + batch, batch, start, stop)
        yield len(rows)
    reader.close()


def index_part() -> None:
    """Time and memory of an index and of an epoch's first window of every lane."""
    print("| row groups | lanes opened | | seconds of CPU time | MB beside the rows | MB of rows |")
    print("|---|---|---|---|---|---|")
    for count, batch, ranks in [
        (10**7, 448, 1),
        (10**7, 4096, 1),
        (10**7, 4096, 64),
        (10**8, 4096, 64),
    ]:
        rows = uneven_groups(count)
        zero = np.zeros(1, np.int64)
        file = DataFile("a.parquet", FileVersion(1, "tag"), 0, "digest")
        index = Index((file,), b"", ("x",), rows, Parts(zero, zero, zero, zero, zero), 1.0, 1)
        begin = time.process_time()
        _first_runs(index, batch, ranks)
        seconds = time.process_time() - begin
        tracemalloc.start()
        _first_runs(dataclasses.replace(index), batch, ranks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"| {count:,} | {batch // ranks:,} | a lane for each slot | {seconds:.2f} | "
            f"{peak / 1e6:.1f} | {rows.nbytes / 1e6:.0f} |"
        )
    rows = uneven_groups(10**7)
    tracemalloc.start()
    begin = time.process_time()
    Plan(rows, 0, 64, 2).window_at(0, 0, 0)
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"| {10**7:,} | 1 | windows, of older runs | {seconds:.2f} | {peak / 1e6:.1f} | "
        f"{rows.nbytes / 1e6:.0f} |"
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nLargest resident set: {resident:.0f} MiB.")


def _first_runs(index: Index, batch: int, ranks: int) -> None:
    """Plan what the first batch of a rank needs."""
    plan = SlotPlan(index.rows, 0, batch)
    lanes = np.arange(batch // ranks)
    for group in plan.runs_at(lanes, np.zeros_like(lanes)).group.tolist():
        index.ids(group, 0, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["ranks", "reading", "index"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if "ranks" in options.parts:
        ranks_part()
    if "reading" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            reading_part(Path(folder), options.rounds)
    if "index" in options.parts:
        index_part()


if __name__ == "__main__":
    main()
