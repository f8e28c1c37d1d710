"""The tests and the measurements on a GPU, within a time: what `make gpu` runs.

    python -m tests.gpu [--minutes 9] [--only tests|measurements] [--parts …] [--data FOLDER]
    python -m tests.gpu --dry-run

The tests come first; the measurements have what they leave of the time. Exits with 1 if either
fails, and with 2 without a GPU. A dry run does both on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

from tests.gpu.device import DRY_RUN, WHY_SKIPPED, begin_dry_run
from tests.gpu.timed import run_within

MINUTES = 9.0
DRY_MINUTES = 60.0  # in which cores may be slow or busy
MOST_WORKERS = 6  # each has a CUDA context of its own
LEAST_MINUTES = 1.0  # for the measurements
LATE = 120  # seconds by which these may take longer
TESTS_SHARE = 0.4
"""Of the time, after which tests that are not done are ended."""


def test_command() -> list[str]:
    """The command that runs the tests, by several workers where there are cores for them."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-ra"]
    command += ["--durations=10", "-p", "no:cacheprovider"]
    workers = min((os.cpu_count() or 1) // 2, MOST_WORKERS)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(workers), "--dist", "loadfile"]
    return command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="of both together; default: 9")
    parser.add_argument("--since", type=float, help="when they began, in seconds of the epoch")
    parser.add_argument("--only", choices=("tests", "measurements"))
    parser.add_argument("--parts", nargs="+", help="of the measurements; default: all")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        begin_dry_run()
    elif not torch.cuda.is_available():
        print(f"tests.gpu {WHY_SKIPPED.replace(f'{DRY_RUN}=1', '--dry-run')}", file=sys.stderr)
        return 2
    whole = options.minutes or (DRY_MINUTES if options.dry_run else MINUTES)
    ends = (options.since or time.time()) + 60 * whole
    problems: dict[str, str | None] = {}
    if options.only != "measurements":
        share = 1 if options.only == "tests" or options.dry_run else TESTS_SHARE
        problems["tests"] = run_within(share * (ends - time.time()), test_command())[1]
    if options.only != "tests":
        left = LEAST_MINUTES if options.dry_run else (ends - time.time()) / 60
        minutes = max(left, LEAST_MINUTES)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--minutes", f"{minutes:.2f}"]
        command += ["--parts", *options.parts] if options.parts else []
        command += ["--data", str(options.data)] if options.data else []
        command += ["--dry-run"] if options.dry_run else []
        late = 60 * DRY_MINUTES if options.dry_run else LATE
        problems["measurements"] = run_within(60 * minutes + late, command)[1]
    for name, problem in problems.items():
        print(f"{name}: {problem or 'all went well'}", file=sys.stderr, flush=True)
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
