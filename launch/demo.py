"""The demo: a model learns handwritten digits from 40 labels, with and without unlabelled scans.

    make demo                           # or, in an environment with hpdist[wandb,demo]:
    python launch/demo.py --seeds 1

Uses every GPU with fp16 and DeepSpeed ZeRO-2, or two CPU processes where there is none: with bf16,
or with fp32 on a processor that has no instructions for it.
Everything it writes is in `demo/`; runs of an earlier demo there are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hpdist.data.samples.digits import write_digits

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FOLDER = Path("demo")  # where configs/digits.yaml expects the digits
ALGORITHMS = {"supervised": "labels only", "fixmatch": "FixMatch"}
COLORS = {"supervised": "#b3541e", "fixmatch": "#1f5fa8"}
LABELED, UNLABELED_RATIO = 32, 7  # as in configs/digits.yaml


@dataclass(frozen=True)
class Run:
    """One finished training."""

    folder: Path

    @property
    def accuracy(self) -> float:
        """Of the teacher, on the test split, in percent."""
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return 100 * float(summary["test/accuracy"])

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values in percent of a number that was logged."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if key in record]
        return [r["step"] for r in records], [100 * r[key] for r in records]


Results = dict[str, list[Run]]  # by algorithm, one run per seed


def main() -> int:
    """Train, then show what came of it; returns the exit status."""
    options = parse_options()
    write_digits(FOLDER / "digits")
    shutil.rmtree(FOLDER / "runs", ignore_errors=True)
    launcher, overrides = choose_launcher(torch.cuda.device_count())
    if options.steps:
        every = max(options.steps // 4, 1)
        overrides += ["--steps", str(options.steps), "--eval.every", str(every)]
    results: Results = {name: [] for name in ALGORITHMS}
    started = time.monotonic()
    for seed in range(options.seeds):
        spent = time.monotonic() - started
        if seed and spent * (seed + 1) / seed > 60 * options.minutes:
            print(f"\n{seed} of {options.seeds} seeds: another takes longer than --minutes allows.")
            break
        for algorithm, runs in results.items():
            folder = FOLDER / "runs" / f"{algorithm}-seed{seed}"
            print(f"\n{ALGORITHMS[algorithm]}, seed {seed}", flush=True)
            status = train(launcher, algorithm, seed, folder, overrides)
            if status:
                print(f"The training stopped with exit status {status}.", file=sys.stderr)
                return status
            runs.append(Run(folder))
    draw(results, FOLDER / "curves.png")
    print(report(results))
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Handwritten digits from 40 labels.")
    parser.add_argument("--seeds", type=int, default=3, help="runs per algorithm (3)")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the config's")
    parser.add_argument("--minutes", type=float, default=2.8, help="time for all seeds (2.8)")
    options = parser.parse_args()
    if options.seeds < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--seeds and --steps must be at least 1")
    return options


def choose_launcher(gpus: int) -> tuple[list[str], list[str]]:
    """The launcher's options, and overrides that make the global batches divide."""
    if not gpus:
        launcher = ["--config_file", str(CONFIGS / "accelerate/cpu_bf16.yaml")]
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # then bf16 is emulated, and slow
            launcher += ["--mixed_precision", "no"]
        return launcher, []
    processes = min(gpus, LABELED)
    labeled = -(-LABELED // processes) * processes
    batch = ["--batch.labeled", str(labeled), "--batch.unlabeled", str(UNLABELED_RATIO * labeled)]
    launcher = ["--config_file", str(CONFIGS / "accelerate/zero2_fp16.yaml")]
    # The path in that file counts from the project's root, and the demo may run elsewhere.
    launcher += ["--deepspeed_config_file", str(CONFIGS / "deepspeed/zero2_fp16.json")]
    return [*launcher, "--num_processes", str(processes)], batch


def train(
    launcher: list[str], algorithm: str, seed: int, folder: Path, overrides: list[str]
) -> int:
    """Run `accelerate launch` and return its exit status; progress goes to the terminal."""
    words = ["launch", *launcher, "-m", "hpdist", "train", str(CONFIGS / "digits.yaml")]
    words += ["--algorithm.name", algorithm, "--run.seed", str(seed)]
    words += ["--run.dir", str(folder.parent), "--run.name", folder.name, *overrides]
    print("$ " + shlex.join(["accelerate", *map(_short, words)]), flush=True)
    code = "from accelerate.commands.accelerate_cli import main; main()"
    threads = max((os.cpu_count() or 1) // 2, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    # The summary that `train` prints is in summary.json, and the table at the end has what matters.
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


def report(results: Results) -> str:
    """The table, where everything is, and how to see more of it."""
    seeds = range(len(results["supervised"]))
    columns = "".join(f"{name:>9}" for name in [*(f"seed {seed}" for seed in seeds), "mean"])
    lines = ["", f"{'test accuracy, %':20}{columns}"]
    for algorithm, runs in results.items():
        values = [run.accuracy for run in runs]
        numbers = "".join(f"{value:9.1f}" for value in [*values, sum(values) / len(values)])
        lines.append(f"{ALGORITHMS[algorithm]:20}{numbers}")
    runs_folder = FOLDER / "runs"
    lines += [
        "",
        f"curves       {FOLDER / 'curves.png'}",
        f"run folders  {runs_folder}/ (config.yaml, metrics.jsonl, summary.json, checkpoints)",
        f"in W&B       wandb login && wandb sync {runs_folder}/*/wandb/offline-run-*",
    ]
    return "\n".join(lines)


def draw(results: Results, file: Path) -> None:
    """Draw accuracy and mask rate over the steps: every seed thin, the mean bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for algorithm in reversed(results):
        _plot(left, results[algorithm], "eval/test/accuracy", algorithm)
    _plot(right, results["fixmatch"], "mask_rate", "fixmatch")
    left.set(title="Digits, 40 labels", ylabel="test accuracy, %")
    right.set(title="Unlabelled scans above the threshold", ylabel="mask rate, %", ylim=(0, 100))
    left.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.set(xlabel="optimizer step", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _plot(axes: object, runs: list[Run], key: str, algorithm: str) -> None:
    color, curves = COLORS[algorithm], [run.curve(key) for run in runs]
    for steps, values in curves:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    mean = [sum(values) / len(values) for values in zip(*(v for _, v in curves), strict=True)]
    axes.plot(curves[0][0], mean, color=color, linewidth=2, label=ALGORITHMS[algorithm])


def _short(word: str) -> str:
    """A path as it reads from here, where that is shorter."""
    relative = os.path.relpath(word) if os.path.isabs(word) else word
    return min(word, relative, key=len)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
