"""Images per second of the Decoder against Pillow in a bare loop, on the same stored images.

    python -m tests.benchmarks.decoding [--data FOLDER] [--workers 1 2] [--rounds 120]

The images are CIFAR-10's JPEGs of 32x32, and the same resized to 256x256 with noise and stored as
JPEG at quality 90. The bare loop opens, converts to RGB and takes an array, which it throws away;
over several threads, each has a contiguous part. The Decoder fills a tensor [rows, 3, height,
width]. All take turns, round by round; ratios are medians, with quartiles, of those of each round.
A ratio above 1: the Decoder is faster. The processor time of all threads is told as well, since it
depends less on who else uses the machine.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.decode.stored_values import stored_values

DATA = Path(__file__).parents[3] / "shared" / "data"
STARTS = 6  # of threads and processes, each for an equal share of the rounds
BATCHES = {32: 256, 256: 128}  # rows of a round, by side


def images(data: Path, side: int, rows: int) -> list[bytes]:
    """CIFAR-10's JPEGs, or larger ones made of them."""
    file = min((data / "cifar10").glob("train-*.parquet"))
    stored = stored_values(pq.read_table(file, columns=["image"]).column(0)[:rows])
    small = [value["bytes"] for value in stored]
    return small if side == 32 else [enlarged(row, value, side) for row, value in enumerate(small)]


def enlarged(row: int, value: bytes, side: int) -> bytes:
    """Resized, with the noise of a camera, which costs the decoder what a photo's detail does."""
    image = (
        Image.open(io.BytesIO(value)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    )
    noise = np.random.default_rng(row).normal(0, 6, (side, side, 3))
    file = io.BytesIO()
    pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def bare_loop(values: list[bytes]) -> None:
    for value in values:
        np.asarray(Image.open(io.BytesIO(value)).convert("RGB"))


def run_in_thread(
    loader: ThreadPoolExecutor, decode: Callable[..., object], values: list[bytes]
) -> None:
    """As a stream does it: in a thread that does nothing else."""
    loader.submit(decode, values).result()


def spread(pool: ThreadPoolExecutor, parts: list[list[bytes]]) -> None:
    """The bare loop over several threads."""
    list(pool.map(bare_loop, parts))


@dataclass
class Times:
    """Seconds of each loop, round by round."""

    clock: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    processor: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, loops: dict[str, Callable[[], object]], rounds: int, first: int) -> None:
        """Time the loops in turns, and let another begin each round."""
        names = list(loops)
        for number in range(rounds + 3):
            begin = (number + first) % len(names)
            for name in names[begin:] + names[:begin]:
                used, start = time.process_time(), time.perf_counter()
                loops[name]()
                if number >= 3:  # the first ones warm up
                    self.clock[name].append(time.perf_counter() - start)
                    self.processor[name].append(time.process_time() - used)


def ratios(bare: list[float], ours: list[float]) -> str:
    low, median, high = statistics.quantiles([a / b for a, b in zip(bare, ours, strict=True)], n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def compare(values: list[bytes], workers: int, rounds: int) -> list[str]:
    """Rows of the table: the Decoder by threads and by processes against the bare loop."""
    spec = ImageSpec.of(values[0])
    cut = [
        values[k * len(values) // workers : (k + 1) * len(values) // workers]
        for k in range(workers)
    ]
    times = Times()
    for start in range(STARTS):  # whose thread is made first, and gets which memory, matters
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            loader = stack.enter_context(ThreadPoolExecutor(1))
            threads = stack.enter_context(Decoder(spec, threads=workers))
            processes = stack.enter_context(Decoder(spec, processes=workers))
            loops: dict[str, Callable[[], object]] = {
                "bare loop": functools.partial(run_in_thread, loader, bare_loop, values),
                "threads": functools.partial(run_in_thread, loader, threads.decode, values),
                "processes": functools.partial(run_in_thread, loader, processes.decode, values),
            }
            if workers > 1:
                loops["bare loop"] = functools.partial(spread, pool, cut)
            times.measure(loops, rounds // STARTS, start)
    clock, processor = times.clock, times.processor
    lines = []
    for name in ("threads", "processes"):
        speeds = [len(values) / statistics.median(clock[key]) for key in (name, "bare loop")]
        used = ratios(processor["bare loop"], processor[name]) if name == "threads" else ""
        side = spec.shape[1]
        lines.append(
            f"| {side}x{side} | {workers} | {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
            f"| {ratios(clock['bare loop'], clock[name])} | {used} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = os.environ.get("HPDIST_TEST_DATA", DATA)
    parser.add_argument("--data", type=Path, default=folder, help="holds cifar10/train-*.parquet")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=120)
    options = parser.parse_args()
    print("| images | workers | Decoder by | images/s | bare loop | by the clock | by CPU time |")
    print("|---|---|---|---|---|---|---|")
    for side, rows in BATCHES.items():
        values = images(options.data, side, rows)
        for workers in options.workers:
            print("\n".join(compare(values, workers, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
