"""Step time of hpdist against a bare PyTorch loop with the same maths on the same tensors.

    python -m tests.benchmarks.step_time [--rounds 8] [--precision fp32 bf16] [--ranks 2]
    python -m tests.benchmarks.step_time --compile

FixMatch on WRN-28-2, batch 8 with mu 7 per rank. The two take turns, step by step, so that the
ratio holds when the machine's speed drifts; the order within a round alternates. With several ranks
the bare loop is DDP with hpdist's batch normalisation, since torch's SyncBatchNorm needs GPUs. With
`--compile` both are hpdist, the first with a compiled model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hpdist.data.views import ImageViewsConfig
from hpdist.models import WideResNet
from tests.benchmarks.plain_loop import Loop, PlainLoop, hpdist_loop, several_ranks
from tests.support.ranks import run_ranks

BATCH, MU, CLASSES = 8, 7, 10


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    precision: str, rounds: int, compiled: bool = False, clock: str = "wall"
) -> tuple[list[float], list[float]]:
    """Seconds per step, round by round: (hpdist, what it is held against)."""
    now = CLOCKS[clock]
    torch.manual_seed(0)
    model = WideResNet(3, CLASSES)
    views = ImageViewsConfig().build(0)
    other: Loop
    if compiled:
        ours = hpdist_loop(copy.deepcopy(model), views, precision, backend="inductor")
        other = hpdist_loop(model, views, precision)
    else:
        ours = hpdist_loop(copy.deepcopy(model), views, precision)  # joins the ranks
        other = PlainLoop(model, views, "hpdist" if several_ranks() else "torch", precision)
    x = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(CLASSES, (BATCH,))
    u = torch.randint(256, (BATCH * MU, 3, 32, 32), dtype=torch.uint8)
    times: dict[Loop, list[float]] = {ours: [], other: []}
    for number in range(rounds + 2):
        for loop in [ours, other] if number % 2 else [other, ours]:
            if several_ranks():
                dist.barrier()
            start = now()
            loop(x, y, u)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                times[loop].append(now() - start)
    return times[ours], times[other]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others work")
    options = parser.parse_args()
    one, two = ("compiled", "eager") if options.compile else ("hpdist", "bare loop")
    print(f"| precision | {one}, s/step | {two}, s/step | ratio by round: median (min to max) |")
    print("|---|---|---|---|")
    for precision in options.precision:
        settings = (precision, options.rounds, options.compile, options.clock)
        if options.ranks == 1:
            ours, other = measure(*settings)
        else:
            ours, other = run_ranks(options.ranks, measure, *settings, timeout=3600)[0]
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        print(
            f"| {precision} | {statistics.median(ours):.3f} | {statistics.median(other):.3f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
