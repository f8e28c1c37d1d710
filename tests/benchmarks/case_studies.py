"""Two case studies on made-up tables: how fast the loss falls, and what half precision changes.

    python -m tests.benchmarks.case_studies --out FOLDER [--steps 5000] [--precisions bf16]

The first trains `configs/case_synthetic.yaml` and says at which step the mean loss of the last 1,
10, 100 and 1,000 steps first lies below 0.5, 0.3, 0.2 and 0.1. The second trains
`configs/case_classification.yaml` in fp32, converts the teacher's weights to fp16 and bf16, and
measures each on the same test rows. Prints Markdown and writes it into `--out`. A finished run is
kept, so that a second call only does what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpdist.data.samples.synthetic import write_classification, write_clusters
from hpdist.train import config as configuration
from tests.support.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
WINDOWS = (1, 10, 100, 1000)
BARS = (0.5, 0.3, 0.2, 0.1)


def settings(name: str, tables: Path, runs: Path, run: str, *more: str) -> Any:
    """A case's config, with its data in `tables` and its run in `runs`."""
    parts = {"labeled": "train", "unlabeled": "train", "test": "test"}
    files = [
        f"--data.{part}.data_files.{split}={tables}/{part}.parquet" for part, split in parts.items()
    ]
    own = [f"--run.dir={runs}", f"--run.name={run}", "--tracker.name=none"]
    return configuration.load(CONFIGS / f"{name}.yaml", [*files, *own, *more])


def first_below(losses: list[float], window: int, bar: float) -> int | None:
    """The first step, from 1, at which the mean of the last `window` losses is below `bar`."""
    sums = np.cumsum([0.0, *losses])
    means = (sums[window:] - sums[:-window]) / window
    below = np.flatnonzero(means < bar)
    return int(below[0]) + window if len(below) else None


def train_synthetic(out: Path, run: str, *more: str) -> None:
    """Train the first case on this process."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    from hpdist.train.trainer import Trainer

    tables = write_clusters(out / "clusters")
    Trainer.from_config(settings("case_synthetic", tables, out, run, *more)).fit()


def synthetic_table(folder: Path) -> list[str]:
    """The table of the first case."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = []
    for key in ("supervised_loss", "loss"):
        losses = [record[key] for record in records]
        found += [
            f"`{key}`, {len(losses)} steps; mean of the last "
            f"{min(1000, len(losses))}: {np.mean(losses[-1000:]):.4f}, largest {max(losses):.2f}",
            "",
            "| mean of the last | " + " | ".join(f"below {bar}" for bar in BARS) + " |",
            "|---" * (len(BARS) + 1) + "|",
        ]
        for window in WINDOWS:
            steps = [first_below(losses, window, bar) for bar in BARS]
            shown = " | ".join("never" if step is None else f"{step:,}" for step in steps)
            found.append(f"| {window:,} | {shown} |")
        found.append("")
    return found


@dataclass(frozen=True)
class Converted:
    """A model's weights in one dtype, on the test rows."""

    accuracy: float
    agreement: float
    """Share of the rows with the same class as in fp32."""
    apart: float
    """Largest difference of a class's probability."""
    bytes: int


def train_classification(out: Path, run: str, *more: str) -> dict[str, Converted]:
    """Train the second case on this process, and measure its teacher in every dtype."""
    from hpdist.train.trainer import Trainer

    tables = write_classification(out / "classification")
    trainer = Trainer.from_config(settings("case_classification", tables, out, run, *more))
    summary = trainer.fit()
    test, teacher = trainer.data.test, trainer.step.teacher
    assert test is not None
    assert teacher is not None
    inputs = trainer.data.spec.decode_rows(test.read(np.arange(len(test))), test.chosen, test.name)
    inputs = trainer.data.views.plain(inputs)
    model = copy.deepcopy(trainer.step.engine.module).float().eval()
    model.load_state_dict(teacher.whole())
    found = compare(model, inputs, torch.from_numpy(test.labels))
    assert found["fp32"].accuracy == summary["test/accuracy"]
    return found


@torch.no_grad()
def compare(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Converted]:
    """Measure a model, and copies of it in half precision, on the same rows."""
    reference = model(inputs).softmax(dim=1)
    found = {}
    for name, dtype in (
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ):
        converted = copy.deepcopy(model).to(dtype)
        probabilities = converted(inputs.to(dtype)).float().softmax(dim=1)
        guessed = probabilities.argmax(dim=1)
        found[name] = Converted(
            (guessed == labels).double().mean().item(),
            (guessed == reference.argmax(dim=1)).double().mean().item(),
            (probabilities - reference).abs().max().item(),
            sum(p.numel() * p.element_size() for p in converted.parameters()),
        )
    return found


def classification_table(found: dict[str, Converted]) -> list[str]:
    """The table of the second case."""
    return [
        "| weights and inputs | test accuracy, % | same class as fp32, % | largest difference of a "
        "probability | bytes of weights |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {100 * c.accuracy:.2f} | {100 * c.agreement:.2f} | {c.apart:.1e} "
            f"| {c.bytes:,} |"
            for name, c in found.items()
        ),
    ]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    options = parser.parse_args()
    lines = []
    for precision in options.precisions:
        run = f"synthetic-{precision}"
        if not (options.out / run / "summary.json").exists():
            more = (f"--precision={precision}", f"--steps={options.steps}")
            run_ranks(1, train_synthetic, options.out, run, *more, timeout=36_000)
        accuracy = json.loads((options.out / run / "summary.json").read_text())["test/accuracy"]
        lines += [f"### {precision}, test accuracy {100 * accuracy:.2f} %", ""]
        lines += synthetic_table(options.out / run)
    run_of = "classification"
    (found,) = run_ranks(1, train_classification, options.out, run_of, timeout=36_000)
    lines += ["### classification, trained in fp32", "", *classification_table(found)]
    text = "\n".join(lines) + "\n"
    print(text)
    (options.out / "case_studies.md").write_text(text)


if __name__ == "__main__":
    main()
