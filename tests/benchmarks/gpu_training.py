"""CIFAR-10 with 250 labels in bf16 for some minutes: steps, accuracy, and how idle the device is.

    python -m tests.benchmarks.gpu_training --data FOLDER [--seconds 360] [--dry-run]

A part of `tests.benchmarks.gpu`. FixMatch on WRN-28-2, 64 + 448 rows a step. A trial of some steps
decides how many fit into the time, which the schedule needs to know. Prints Markdown.

The folder has Parquet files, `train-*.parquet` and `test-*.parquet`, with columns `img` or `image`,
and `label`. A dry run writes small pictures of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hpdist.data.samples.digits import write_digits
from hpdist.train import config
from hpdist.train.trainer import Trainer
from tests.gpu.device import begin_dry_run

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_fixmatch.yaml"
TRIAL, WARM = 80, 20
"""Steps of the trial, and how many of them are not counted."""
KEPT = 2000  # latest steps whose times are kept
_TINY: dict[str, Any] = {
    "model": {"name": "cnn", "width": 4},
    "batch": {"labeled": 10, "unlabeled": 20},
    "views": {"weak": {"flip": False}},
}


class StepTimes:
    """A step that notes when the device begins and ends the work of each call.

    On a GPU by events in the stream, which nothing waits for until all is over; on a CPU by the
    clock. Everything else is the step's own.
    """

    def __init__(self, step: Any) -> None:
        self.step = step
        self.marks: list[tuple[Any, Any]] = []
        self.calls: list[float] = []  # the clock's time of each, in seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(time.perf_counter())
        begun = self._now()
        outcome = self.step(*args, **kwargs)
        self.marks.append((begun, self._now()))
        del self.marks[:-KEPT]
        return outcome

    def _now(self) -> Any:
        if self.step.engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def idle_share(self) -> float | None:
        """The share of the time in which no step's work was begun; None before the third step.

        The longest hundredth of the gaps, in which the run evaluated or saved, is left out.
        """
        if len(self.marks) < 3:
            return None
        if self.step.engine.device.type == "cuda":
            torch.cuda.synchronize(self.step.engine.device)
        gaps = [_between(a[1], b[0]) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        work = [_between(*mark) for mark in self.marks[1:]]
        return idle(gaps, work)


def idle(gaps: Sequence[float], work: Sequence[float]) -> float:
    """The share of gaps in the time of gaps and work, without the longest hundredth of the gaps."""
    kept = sorted(zip(gaps, work, strict=True))[: len(gaps) - -(-len(gaps) // 100) or None]
    between, within = (float(np.sum(part)) for part in zip(*kept, strict=True))
    return between / (between + within)


def _between(begun: Any, ended: Any) -> float:
    if isinstance(begun, float):
        return float(ended - begun)
    return max(float(begun.elapsed_time(ended)) / 1e3, 0.0)


def settings(data: Path, runs: Path, steps: int, tiny: bool) -> dict[str, Any]:
    """The settings of a run of so many steps."""
    values: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    train = {"train": f"{data}/train-*.parquet"}
    values["data"]["labeled"]["data_files"] = values["data"]["unlabeled"]["data_files"] = train
    values["data"]["test"]["data_files"] = {"test": f"{data}/test-*.parquet"}
    values |= {
        "run": {"dir": str(runs), "name": "cifar10"},
        "tracker": {"name": "none"},
        "precision": "bf16",
        "steps": steps,
        "eval": {"every": steps},
        "checkpoint": {"every": steps},
        "log": {"every": max(steps // 50, 1)},
    }
    return values | (_TINY if tiny else {})


def seconds_of_a_step(values: dict[str, Any], warm: int) -> float:
    """Seconds of a step of this run, the reading of rows included, without its first steps."""
    rows = {name: part for name, part in values["data"].items() if name != "test"}
    trainer = Trainer.from_config(config.parse(values | {"data": rows}), files=False)
    times = StepTimes(trainer.step)
    trainer.step = times  # type: ignore[assignment]
    trainer.fit()
    return (times.calls[-1] - times.calls[warm]) / (len(times.calls) - 1 - warm)


def train(data: Path, seconds: float, tiny: bool) -> str:
    """Train for about so long; what came of it, as Markdown."""
    attempts, warm = (6, 2) if tiny else (TRIAL, WARM)
    with tempfile.TemporaryDirectory() as name:
        values = settings(data, Path(name), attempts, tiny)
        step = seconds_of_a_step(values, warm)
        steps = min(max(int(0.95 * seconds / step), attempts), attempts if tiny else 10**6)
        trainer = Trainer.from_config(config.parse(settings(data, Path(name), steps, tiny)))
        times = StepTimes(trainer.step)
        trainer.step = times  # type: ignore[assignment]
        summary = trainer.fit()
    share = times.idle_share()
    took = float(summary["seconds"])  # type: ignore[arg-type]
    rows = values["batch"]["labeled"] + values["batch"]["unlabeled"]
    labels = len(trainer.data.labeled)
    return (
        "| labels | steps | training, s | images/s | test accuracy, teacher | student | "
        "skipped steps | device idle between steps |\n|---|---|---|---|---|---|---|---|\n"
        f"| {labels} | {steps:,} | {took:.0f} | {steps * rows / took:,.0f} "
        f"| {summary['test/accuracy']:.4f} | {summary['test/accuracy_student']:.4f} "
        f"| {summary['skipped_steps']} | {'-' if share is None else f'{share:.1%}'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the Parquet files")
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        begin_dry_run()
        with tempfile.TemporaryDirectory() as name:
            print(train(write_digits(Path(name)), options.seconds, tiny=True))
        return
    if options.data is None or not list(options.data.glob("train-*.parquet")):
        parser.error(f"--data: {options.data} has no train-*.parquet")
    print(train(options.data, options.seconds, tiny=False))


if __name__ == "__main__":
    main()
