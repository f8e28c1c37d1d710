"""What a checkpoint costs: training time lost, bytes on disk, time to verify and load.

    python -m tests.benchmarks.checkpoint --out FOLDER [--depth 28] [--width 10]

FixMatch on a WideResNet, one process. In each round the same steps are trained three times: without
a checkpoint, with one written before they go on, and with one written in the background.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hpdist.checkpoint.reader import SavedRun
from hpdist.train.trainer import Trainer

MODES = ("none", "foreground", "background")


def make_trainer(options: argparse.Namespace) -> Trainer:
    """A trainer on noise, which is as good as anything for this."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    features = datasets.Features(
        {"x": datasets.Array3D((3, 32, 32), "uint8"), "label": datasets.ClassLabel(10)}
    )
    rows = {"x": list(noise), "label": [row % 10 for row in range(64)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    model = {"name": "wide_resnet", "depth": options.depth, "width": options.width}
    return Trainer(
        {**model, "norm": "group"},
        "fixmatch",
        labeled=(data, {"input": "x"}),
        unlabeled=(data, {"input": "x"}),
        batch={"labeled": 2, "unlabeled": 2},
        run={"dir": str(options.out), "name": "run"},
        checkpoint={"every": 1_000_000, "resume": "never"},
        tracker={"name": "none"},
        steps=1_000_000,
    )


def measure(trainer: Trainer, mode: str, steps: int) -> tuple[float, float]:
    """Seconds for some steps, and of them those that saving kept the training waiting."""
    waited = trainer.writer.waited
    trainer.writer._background = mode == "background"
    start = time.perf_counter()
    if mode != "none":
        trainer.save()
    for _ in range(steps):
        trainer._attempt(measure=False)
    taken = time.perf_counter() - start
    waited = trainer.writer.waited - waited
    trainer.writer.finish()
    return taken, waited


def state_bytes(trainer: Trainer) -> int:
    """The sum of what has to be kept: weights, optimizer, teacher, buffers."""
    engine, teacher = trainer.step.engine, trainer.step.teacher
    assert teacher is not None
    fragments = [*engine.master_fragments(), *teacher.fragments]
    for pieces in engine.optimizer_fragments().values():
        fragments += pieces
    return sum(fragment.values.nbytes for fragment in fragments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    trainer = make_trainer(options)
    trainer._open_log(files=False)
    trainer._attempt(measure=False)
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES if number % 2 else MODES[::-1]:
            times[mode].append(measure(trainer, mode, options.steps))
    parameters = sum(p.numel() for p in trainer.step.engine.module.parameters())
    kept = state_bytes(trainer)
    path = options.out / "run/checkpoints/step-00000000"
    path = next(path.parent.glob("step-*"))
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    start = time.perf_counter()
    saved = SavedRun(path)
    verified = time.perf_counter() - start
    start = time.perf_counter()
    trainer.state.load(saved, data=False)
    loaded = time.perf_counter() - start
    plain = statistics.median(taken for taken, _ in times["none"])
    print(table(options, times, plain, parameters))
    print(
        f"On disk: {on_disk / 1e6:.1f} MB, the states' sum is {kept / 1e6:.1f} MB: "
        f"{on_disk / kept:.4f}. To verify: {verified / plain * options.steps:.2f} steps' time, to "
        f"load: {loaded / plain * options.steps:.2f}."
    )
    trainer.close()


def table(options: argparse.Namespace, times: dict[str, Any], plain: float, parameters: int) -> str:
    """Markdown: time lost per checkpoint, in steps' time."""
    step = plain / options.steps
    lines = [
        f"WRN-{options.depth}-{options.width}, {parameters / 1e6:.1f} M parameters, fp32, SGD, one "
        f"process on {os.cpu_count()} CPU cores, {options.rounds} rounds of {options.steps} steps "
        f"of {step:.2f} s.",
        "",
        "| written | training waits, s | time lost, s: median (min to max) | in steps |",
        "|---|---|---|---|",
    ]
    for mode in ("foreground", "background"):
        pairs = zip(times[mode], times["none"], strict=True)
        lost = [taken - bare for (taken, _), (bare, _) in pairs]
        waits = statistics.median(wait for _, wait in times[mode])
        middle = statistics.median(lost)
        lines.append(
            f"| {mode} | {waits:.2f} | {middle:.2f} ({min(lost):.2f} to {max(lost):.2f}) "
            f"| {middle / step:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
