"""What `hpdist plan` says of a GPU's memory, and the most that torch's allocator gave to the run.

    python -m tests.benchmarks.gpu_memory [--seconds 60] [--dry-run]

A part of `tests.benchmarks.gpu`. FixMatch on digits of 32 x 32 pixels, 64 + 448 rows a step, bf16;
three steps, and the evaluation of all test rows. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hpdist.data.samples.digits import write_digits
from hpdist.plan.memory_meter import MemoryMeter
from hpdist.plan.memory_plan import rehearsed
from hpdist.train import config
from hpdist.train.trainer import Trainer
from tests.benchmarks.memory_plan import settings
from tests.gpu.device import begin_dry_run, on_ranks, the_device

_VIEWS = {"size": 32, "channels": 3, "weak": {"shift": 0.125, "flip": False}}
_SGD = {"name": "sgd", "lr": 0.03}
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "WRN-28-2": ({"model": {"name": "wide_resnet", "depth": 28, "width": 2}, "optim": _SGD}, None),
    "WRN-28-10": (
        {"model": {"name": "wide_resnet", "depth": 28, "width": 10}, "optim": _SGD},
        None,
    ),
    "WRN-28-10, ZeRO-2": (
        {"model": {"name": "wide_resnet", "depth": 28, "width": 10}, "optim": _SGD},
        2,
    ),
}
_TINY = {"model": {"name": "wide_resnet", "depth": 10, "width": 1}}
_TINY_ROWS = {"batch": {"labeled": 4, "unlabeled": 8}, "views": _VIEWS | {"size": 8}}


def real_peak(values: dict[str, Any]) -> tuple[int, int]:
    """Bytes at the peak of a real run: of its tensors by the meter, and of torch's allocator.

    On a CPU both are the meter's.
    """
    device = the_device()
    with MemoryMeter(device) as meter:
        meter.mark("run")
        Trainer.from_config(config.parse(values), files=False).fit()
    return meter.peak, allocated_at_most(device) or meter.peak


def allocated_at_most(device: torch.device) -> int:
    """Bytes that torch's allocator had given out at most; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def compare(values: dict[str, Any], stage: int | None) -> tuple[int, int]:
    """Bytes at the peak: planned, and allocated in a real run of one rank."""
    planned = rehearsed(config.parse(values).model_dump(mode="json"), 1, stage)
    assert planned.rehearsal is not None, planned.problem
    ((_, allocated),) = on_ranks(real_peak, 1, values)
    return planned.rehearsal.peak, allocated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        begin_dry_run()
    print("| model | planned, MB | allocated, MB | planned / allocated |\n|---|---|---|---|")
    ends = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = write_digits(Path(name))
        for case, (changes, stage) in CASES.items():
            if time.monotonic() > ends and not options.dry_run:
                print(f"| {case} | no time was left | | |", flush=True)
                continue
            values = settings(folder, "CNN", stage) | {"views": _VIEWS} | changes
            values |= {**_TINY, **_TINY_ROWS} if options.dry_run else {}
            planned, allocated = compare(values, stage)
            numbers = f"{planned / 1e6:,.1f} | {allocated / 1e6:,.1f} | {planned / allocated:.3f}"
            print(f"| {case} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
