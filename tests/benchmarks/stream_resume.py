"""Resuming a stream at 90 % of one file: bytes read, and time to the first batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpdist.data.stream.index import Index
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.reader import Reader
from tests.benchmarks.stream_files import COLUMN, index_of, spread, stream_of, write_file

ROWS, GROUP = 400_000, 100  # 400 MB, in the row groups that `datasets` writes images in
BATCH = 448


def measure(folder: Path, rounds: int, rows: int = ROWS) -> None:
    """Print a table of both files, whose footers hold the statistics of each row group or not."""
    position = rows * 9 // 10
    print(
        f"Resumed at row {position:,} of {rows:,} in one file, row groups of {GROUP} rows of 1 KB, "
        f"batch of {BATCH}: median (quartiles) of {rounds} rounds.\n"
    )
    print("| footer | | bytes read, MB | time to the first batch, ms | of which the index, ms |")
    print("|---|---|---|---|---|")
    for row_statistics in (True, False):
        path = folder / f"train-{row_statistics}.parquet"
        write_file(path, rows, GROUP, 0, row_statistics=row_statistics)
        footer = int.from_bytes(path.read_bytes()[-8:-4], "little")
        index_of([path])  # which keeps it on disk
        kind = f"{footer / 1e6:.1f} MB, with{'' if row_statistics else 'out'} statistics"
        _print_file(path, kind, position, rounds)
        path.unlink()
    print()


def _print_file(path: Path, kind: str, position: int, rounds: int) -> None:
    cases: dict[str, Callable[[Index], Reader]] = {
        f"hpdist, {name}": _resumed(position, budget, ranks)
        for name, budget, ranks in [
            ("default shuffle_window", None, 1),
            ("default shuffle_window, rank 0 of 2", None, 2),
            ("shuffle_window: 16MiB", 16 << 20, 1),
        ]
    }
    theirs = _datasets(path, position)
    names = [*cases, "`datasets`, unshuffled, load_state_dict"]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[:: 1 if number % 2 else -1]:
            before, start = _bytes_read(), time.perf_counter()
            opened: Any
            if name in cases:
                index = index_of([path])
                indexed = time.perf_counter() - start
                opened = cases[name](index)
            else:
                indexed = 0.0
                opened = theirs()
            taken = time.perf_counter() - start
            opened.close()
            if number:  # the first one warms up
                found[name].append((_bytes_read() - before, taken * 1e3, indexed * 1e3))
    for name, rows in found.items():
        read, taken_ms, indexed_ms = ([row[column] for row in rows] for column in range(3))
        print(
            f"| {kind} | {name} | {statistics.median(read) / 1e6:.1f} | {spread(taken_ms, 0)} "
            f"| {f'{statistics.median(indexed_ms):.1f}' if name in cases else ''} |"
        )


def _resumed(position: int, budget: int | None, ranks: int) -> Callable[[Index], Reader]:
    """A new reader that has given its first batch."""

    def run(index: Index) -> Reader:
        reader = ParquetReader(index, [COLUMN], "data.unlabeled", 0, BATCH, budget=budget)
        assert len(reader.read(position, BATCH, 0, BATCH // ranks)) == BATCH // ranks
        return reader

    return run


def _datasets(path: Path, position: int) -> Callable[[], Any]:
    """The first batch of a new stream, which takes up the state of an earlier one."""
    stream = stream_of([path]).with_format("arrow")
    batches = stream.iter(1000)
    for _ in range(position // 1000):
        next(batches)
    state = stream.state_dict()
    batches.close()

    def run() -> Any:
        resumed = stream_of([path]).with_format("arrow")
        resumed.load_state_dict(state)
        batches = resumed.iter(BATCH)
        assert len(next(batches)) == BATCH
        return batches

    return run


def _bytes_read() -> int:
    """All that this process has read so far, from the page cache too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
