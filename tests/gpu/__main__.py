"""The tests and the measurements on a GPU, within a time: what `make gpu` runs.

    python -m tests.gpu [--minutes 9] [--only tests|measurements] [--data FOLDER]
    python -m tests.gpu --dry-run

The tests come first; the measurements have what they leave of the time. Exits with 1 if either
fails. A dry run does both on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.gpu.device import DRY_RUN, WHY_SKIPPED, hide_gpus

ROOT = Path(__file__).parents[2]
MOST_WORKERS = 6  # each has a CUDA context of its own
LEAST_MINUTES = 1.0  # for the measurements
TESTS_SHARE = 0.4
"""Of the time, after which tests that are not done are ended."""


def test_command() -> list[str]:
    """The command that runs the tests, by several workers where there are cores for them."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-ra"]
    command += ["--durations=10", "-p", "no:cacheprovider"]
    workers = min((os.cpu_count() or 1) // 2, MOST_WORKERS)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(workers), "--dist", "worksteal"]
    return command


def ended(command: list[str], seconds: float) -> int:
    """Run a command from the root of the repository; its status, or 1 if it is not done in time."""
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"not done within {seconds:.0f} s, and ended", file=sys.stderr, flush=True)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="of both together")
    parser.add_argument("--since", type=float, help="when they began, in seconds of the epoch")
    parser.add_argument("--only", choices=("tests", "measurements"))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        os.environ[DRY_RUN] = "1"
        hide_gpus()
    elif not torch.cuda.is_available():
        parser.error(WHY_SKIPPED.replace(f"{DRY_RUN}=1", "--dry-run"))
    ends = (options.since or time.time()) + 60 * options.minutes
    statuses = []
    if options.only != "measurements":
        share = 1 if options.only == "tests" or options.dry_run else TESTS_SHARE
        statuses.append(ended(test_command(), share * (ends - time.time())))
    if options.only != "tests":
        minutes = max((ends - time.time()) / 60, LEAST_MINUTES)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--minutes", f"{minutes:.2f}"]
        command += ["--data", str(options.data)] if options.data else []
        command += ["--dry-run"] if options.dry_run else []
        statuses.append(ended(command, 60 * minutes + 120))
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main())
