"""Test accuracy of the demo's recipe in fp32, bf16 and fp16: FixMatch on 40 labelled digits.

    python -m tests.benchmarks.digits_precision --out FOLDER [--width 32] [--stage 2]
    python -m tests.benchmarks.digits_precision --out FOLDER --model mlp \\
        --precision fp32 bf16 bf16-state

`bf16-state` also has master weights and optimizer state in bf16.

One process per run, on DeepSpeed unless `--stage none`. Prints a table and writes it to `--out`. A
finished run is kept, so that a second call only does what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from hpdist.data.samples.digits import write_digits
from tests.benchmarks.seeds import ENOUGH, caveat, with_error

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
PRECISIONS = ("fp32", "bf16", "fp16")
STATE = "bf16-state"
BAR = 1.0  # percentage points between the highest and the lowest mean


def train(options: argparse.Namespace, precision: str, seed: int) -> Path:
    """Train once, unless that was done; the run's folder."""
    name = f"{precision}-{options.model}-width{options.width}-stage{options.stage}-seed{seed}"
    folder = Path(options.out, name)
    if (folder / "summary.json").exists():
        return folder
    digits = write_digits(options.out / "digits")
    settings = {
        "data.labeled.data_files.train": f"{digits}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{digits}/train-*.parquet",
        "data.test.data_files.test": f"{digits}/test-*.parquet",
        **_model(options),
        "precision": precision.removesuffix("-state"),
        **({} if options.optimizer == "sgd" else {"optim.name": "adamw", "optim.lr": 0.002}),
        "zero.stage": "null" if options.stage == "none" else options.stage,
        "steps": options.steps,
        "eval.every": max(options.steps // 4, 1),
        "checkpoint.every": max(options.steps // 4, 1),
        "tracker.name": "none",
        "run.seed": seed,
        "run.dir": options.out,
        "run.name": name,
    }
    if precision == STATE:
        keys = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
        settings |= {f"zero.{key}": "true" for key in keys}
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hpdist", "train", str(CONFIG), *overrides]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HPDIST_ALLOW_CPU_FP16": "1"}
    subprocess.run(command, env=environment, check=True)
    return folder


def _model(options: argparse.Namespace) -> dict[str, object]:
    if options.model == "mlp":
        return {"model": f"{{name: mlp, hidden: [{options.width * 4}]}}"}
    return {"model.width": options.width}


def table(options: argparse.Namespace, runs: dict[str, list[Path]]) -> str:
    """Test accuracy of the teacher, as Markdown."""
    sharding = "without DeepSpeed" if options.stage == "none" else f"ZeRO-{options.stage}"
    lines = [
        f"FixMatch, configs/digits.yaml, {options.model.upper()} of width {options.width}, "
        f"{options.steps} steps, {options.optimizer}, {sharding}, one process. Test accuracy of "
        f"the teacher on 360 scans, so one scan is 0.28 points. {caveat(len(options.seeds))}",
        "",
        "| precision | accuracy, % | seeds | spread | student, mean | skipped steps | s per run |",
        "|---|---|---|---|---|---|---|",
    ]
    means = {}
    for precision, folders in runs.items():
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        teacher, student = (
            [100 * summary[key] for summary in summaries]
            for key in ("test/accuracy", "test/accuracy_student")
        )
        means[precision] = statistics.mean(teacher)
        lines.append(
            f"| {precision} | {with_error(teacher, 2)} | {', '.join(f'{a:.2f}' for a in teacher)} "
            f"| {max(teacher) - min(teacher):.2f} | {statistics.mean(student):.2f} "
            f"| {', '.join(str(skipped_steps(folder)) for folder in folders)} "
            f"| {statistics.mean(summary['seconds'] for summary in summaries):.0f} |"
        )
    apart = max(means.values()) - min(means.values())
    met = "met" if apart <= BAR else "not met"
    lines += ["", f"The means lie {apart:.2f} points apart; the bar is {BAR:g} ({met})."]
    return "\n".join(lines) + "\n"


def skipped_steps(folder: Path) -> int:
    """How many steps overflowed."""
    return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["overflows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=32, help="channels; the recipe's are 32")
    parser.add_argument("--stage", default="2", choices=["none", "0", "1", "2", "3"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(ENOUGH))
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=(*PRECISIONS, STATE))
    parser.add_argument("--model", default="cnn", choices=["cnn", "mlp"], help="mlp is quicker")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
    options = parser.parse_args()
    options.out = options.out.resolve()
    runs = {p: [train(options, p, seed) for seed in options.seeds] for p in options.precision}
    text = table(options, runs)
    (options.out / "digits_precision.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
