"""Small real tables: what a few algorithms make of few labels, against the labels alone.

    python -m tests.benchmarks.tables [--seeds 5] [--steps 600]

scikit-learn's breast cancer (20 labels) and wine (15), an MLP, one process of one thread. Every
run has equally many steps; the seed draws the labelled rows, the weights and the noise, while the
30 % of the rows to test on are the same in all. Prints Markdown and writes `results/tables.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.state import AcceleratorState
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split

from hpdist.train.trainer import Trainer
from tests.benchmarks.seeds import ENOUGH, caveat, gains, with_error

RESULTS = Path(__file__).parent / "results" / "tables.md"
TABLES = {  # labelled rows of each class, and what reads the table
    "breast cancer": (10, load_breast_cancer),
    "wine": (5, load_wine),
}
# Set before the first run and not changed after it: weights and lengths in proportion to inputs of
# standard deviation 1 and to a few hundred steps.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "labels alone": {"name": "supervised"},
    "Pi-model": {"name": "pi_model", "unsupervised_weight": 10.0},
    "Mean Teacher": {"name": "mean_teacher", "unsupervised_weight": 10.0},
    "FixMatch": {"name": "fixmatch"},
    "VAT": {"name": "vat", "epsilon": 1.0},
    "all labels": {"name": "fully_supervised"},
}


def write_table(name: str, folder: Path) -> tuple[dict[str, dict[str, Any]], int, int]:
    """Write a table as Parquet, cut in two: training and test rows as sources, and how many."""
    _, load = TABLES[name]
    data = load()
    columns = [f"f{number}" for number in range(data.data.shape[1])]
    train, test = train_test_split(
        range(len(data.target)), test_size=0.3, random_state=0, stratify=data.target
    )
    sources: dict[str, dict[str, Any]] = {}
    sizes: list[int] = []
    for part, rows in (("train", train), ("test", test)):
        table = {column: data.data[rows, k] for k, column in enumerate(columns)}
        path = folder / f"{name.replace(' ', '-')}-{part}.parquet"
        datasets.Dataset.from_dict({**table, "label": data.target[rows]}).to_parquet(str(path))
        sources[part] = {"path": "parquet", "data_files": str(path), "input": columns}
        sizes.append(len(rows))
    return sources, sizes[0], sizes[1]


def run(
    sources: dict[str, dict[str, Any]], labels: int, algorithm: str, seed: int, options: Any
) -> dict[str, Any]:
    """Train once; the summary."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before
    settings = ALGORITHMS[algorithm]
    few = {} if algorithm == "all labels" else {"labels_per_class": labels}
    return Trainer(
        {"name": "mlp", "hidden": [64, 64]},
        settings,
        labeled=sources["train"] | {"label": "label"} | few,
        unlabeled=sources["train"],
        test=sources["test"],
        views={"name": "table"},
        batch={"labeled": 16, "unlabeled": 112},
        optim={"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
        teacher={"decay": 0.99},
        steps=options.steps,
        run={
            "dir": options.out,
            "name": f"{len(sources['train']['input'])}-{settings['name']}-{seed}",
            "seed": seed,
        },
        log={"every": options.steps},
        tracker={"name": "none"},
    ).fit()


def table(name: str, options: Any) -> list[str]:
    """One table of accuracies, in %."""
    labels, load = TABLES[name]
    data = load()
    sources, train, test = write_table(name, Path(options.out))
    classes = len(data.target_names)
    lines = [
        f"## {name.capitalize()}",
        "",
        f"{train + test} rows of {data.data.shape[1]} features, {classes} classes; "
        f"{labels * classes} labels; {train} rows without labels, {test} to test on (one is "
        f"{100 / test:.1f} points).",
        "",
        "| | test accuracy, % | against labels alone | seeds | macro-F1, % |",
        "|---|---|---|---|---|",
    ]
    alone: list[float] = []
    for algorithm in ALGORITHMS:
        found = [run(sources, labels, algorithm, seed, options) for seed in range(options.seeds)]
        accuracies = [100 * summary["test/accuracy"] for summary in found]
        alone = accuracies if algorithm == "labels alone" else alone
        gained = "-" if alone is accuracies else with_error(gains(accuracies, alone), sign=True)
        f1 = statistics.mean(100 * summary["test/macro_f1"] for summary in found)
        seeds = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        lines.append(f"| {algorithm} | {with_error(accuracies)} | {gained} | {seeds} | {f1:.1f} |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=ENOUGH)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        "# Few labels on small tables",
        "",
        f"`python -m tests.benchmarks.tables`: MLP of 64 + 64, {options.steps} steps of 16 + 112 "
        f"rows, AdamW, fp32, {options.seeds} seeds, the EMA teacher's scores after the last step. "
        "The settings were fixed before the first run. Without unlabelled rows, features are "
        f"standardised by the labelled rows alone. {caveat(options.seeds)}",
        "",
    ]
    with tempfile.TemporaryDirectory() as options.out:
        for name in TABLES:
            lines += table(name, options)
    text = "\n".join(lines).rstrip() + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
