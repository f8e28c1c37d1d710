"""FixMatch on CIFAR-10 with 250 labels against the labels alone, at equal steps.

    python -m tests.benchmarks.cifar10 --data FOLDER_OF_SHARDS --out FOLDER [--steps 3000]

Prints a table and writes it, with the curves, to `--out`. One process; bf16; WRN-28-2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10_fixmatch.yaml"


def train(data: Path, runs: Path, algorithm: str, steps: int, batch: int) -> Path:
    """Train one of the two; its run folder."""
    settings = {
        "data.labeled.data_files.train": f"{data}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{data}/train-*.parquet",
        "data.test.data_files.test": f"{data}/test-*.parquet",
        "algorithm.name": algorithm,
        "batch.labeled": batch,
        "batch.unlabeled": 7 * batch,
        "precision": "bf16",
        "steps": steps,
        "eval.every": max(steps // 4, 1),
        "log.every": max(steps // 60, 1),
        "checkpoint.every": max(steps // 5, 1),
        "tracker.name": "none",
        "run.dir": runs,
        "run.name": algorithm,
    }
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hpdist", "train", str(CONFIG), *options]
    subprocess.run(command, check=True)
    return runs / algorithm


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(runs: dict[str, Path], steps: int, batch: int) -> str:
    """What was seen, as Markdown."""
    lines = [
        f"WRN-28-2, 250 labels, batch {batch} + {7 * batch}, bf16, {steps} steps each, one seed.",
        "",
        "| | test accuracy, teacher | student | mask rate at the end | training, s |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        summary = json.loads((run / "summary.json").read_text())
        rate = records(run)[-1].get("mask_rate")
        lines.append(
            f"| {name} | {summary['test/accuracy']:.4f} | {summary['test/accuracy_student']:.4f} "
            f"| {'-' if rate is None else f'{rate:.2f}'} | {summary['seconds']:.0f} |"
        )
    lines += ["", "| step | " + " | ".join(f"{name}, teacher" for name in runs) + " | mask rate |"]
    lines.append("|---" * (len(runs) + 2) + "|")
    key = "eval/test/accuracy"
    curves = {name: {r["step"]: r for r in records(run) if key in r} for name, run in runs.items()}
    for step in sorted(set.intersection(*(set(curve) for curve in curves.values()))):
        values = " | ".join(f"{curve[step][key]:.4f}" for curve in curves.values())
        lines.append(f"| {step} | {values} | {curves['fixmatch'][step].get('mask_rate', 0):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Parquet shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="labelled rows; unlabelled: 7 times")
    arguments = parser.parse_args()
    runs = {
        name: train(arguments.data, arguments.out, name, arguments.steps, arguments.batch)
        for name in ("supervised", "fixmatch")
    }
    text = table(runs, arguments.steps, arguments.batch)
    (arguments.out / "cifar10.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
