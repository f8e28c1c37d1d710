"""Bytes, score and agreement of three models in every precision of torch and ONNX.

    HPDIST_TEST_DATA=FOLDER python -m tests.benchmarks.export_sizes [--out FILE.md]

FOLDER holds `cifar10`, `ag_news` and `fsdd` as shards of Parquet. A WRN-28-2 for pictures, a small
BERT for texts and a CNN for sounds are each trained for a few steps, which ranks nothing: the
weights are merely not random. Prints the tables and writes them to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

import hpdist
from hpdist.evaluate.measure import Measured, measure, open_measured
from hpdist.evaluate.precisions import in_precisions
from hpdist.train import config
from hpdist.train.trainer import Trainer
from tests.support.texts import BERT, write_tokenizer

RESULTS = Path(__file__).parent / "results" / "export_sizes.md"
FILES = (
    *(("ONNX", "onnx", "fp32"), ("ONNX", "onnx", "fp16"), ("ONNX", "onnx", "int8")),
    *(("safetensors", "safetensors", "bf16"), ("safetensors", "safetensors", "fp16")),
)
TEST_ROWS = 100


@dataclass(frozen=True)
class Line:
    """A model in a format and a precision."""

    format: str
    found: Measured
    file_bytes: int | None


def pictures(data: Path, folder: Path) -> dict[str, Any]:
    """WRN-28-2 on CIFAR-10."""
    return {
        "model": {"name": "wide_resnet", "depth": 28, "width": 2},
        "views": {"name": "image"},
        "data": sets(data / "cifar10", "image"),
        "batch": {"labeled": 16, "unlabeled": 16},
        "steps": 40,
        "optim": {"name": "sgd", "lr": 0.03, "momentum": 0.9},
    }


def texts(data: Path, folder: Path) -> dict[str, Any]:
    """A BERT of four layers and 128 units on AG News, from random weights."""
    news = pq.read_table(data / "ag_news" / "train-00000-of-00004.parquet")
    source = folder / "bert"
    words = write_tokenizer(source, news.column("text").to_pylist(), 4000)
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    values = BERT | size | {"vocab_size": words, "initializer_range": 0.02}
    (source / "config.json").write_text(json.dumps(values))
    return {
        "model": {"name": f"hf:{source}", "pretrained": False},
        "views": {"name": "text", "max_length": 48},
        "data": sets(data / "ag_news", "text"),
        "batch": {"labeled": 16, "unlabeled": 16},
        "steps": 100,
        "optim": {"name": "adamw", "lr": 0.001},
    }


def sounds(data: Path, folder: Path) -> dict[str, Any]:
    """A CNN on the log-mel spectrograms of spoken digits."""
    views = {"name": "audio", "sampling_rate": 8000, "seconds": 0.8, "mels": 32, "hop": 0.02}
    return {
        "model": {"name": "cnn", "width": 16},
        "views": views,
        "data": sets(data / "fsdd", "audio"),
        "batch": {"labeled": 16, "unlabeled": 32},
        "steps": 150,
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    }


MODELS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "WRN-28-2, CIFAR-10": pictures,
    "BERT of 4 layers, AG News": texts,
    "CNN, spoken digits": sounds,
}


def sets(folder: Path, column: str) -> dict[str, Any]:
    """The sets of a run: all training rows, of which 50 in a class have labels."""
    train = {"path": "parquet", "data_files": f"{folder}/train-*.parquet", "input": column}
    test = {**train, "data_files": f"{folder}/test-*.parquet", "split": f"train[:{TEST_ROWS}]"}
    return {"labeled": train | {"labels_per_class": 50}, "unlabeled": train, "test": test}


def train(values: dict[str, Any], folder: Path) -> Path:
    """Train in fp32 on one process; the run folder."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before
    whole = {
        "algorithm": {"name": "fixmatch", "threshold": 0.8},
        "precision": "fp32",
        "teacher": {"decay": 0.95},
        "tracker": {"name": "none"},
        "eval": {"batch": 50},
        "run": {"dir": str(folder), "name": "run", "seed": 0},
    }
    Trainer.from_config(config.parse(whole | values)).fit()
    return folder / "run"


def measured(run: Path, folder: Path) -> list[Line]:
    """Measure the model in torch's precisions and as exported files, all on the same rows."""
    loaded = hpdist.load(run, device="cpu")
    rows = open_measured(loaded)
    models = in_precisions(loaded, ["fp32", "bf16", "fp16"])
    names = ["torch"] * len(models)
    places: list[Path | None] = [None] * len(models)
    for name, suffix, precision in FILES:
        place = folder / f"{precision}.{suffix}"
        loaded.export(place, precision=precision)
        models.append(hpdist.load(place, device="cpu"))
        names.append(f"{name}, {precision}")
        places.append(place)
    found = measure(models, rows)
    return [
        Line(name if place else f"torch, {one.precision}", one, place and place.stat().st_size)
        for name, one, place in zip(names, found, places, strict=True)
    ]


def table(name: str, steps: int, lines: list[Line]) -> list[str]:
    """Lay out one model's lines as Markdown."""
    full = lines[0].found
    shown = [
        f"## {name}",
        "",
        f"{steps} steps; {full.rows} test rows.",
        "",
        "| format | weights, bytes | file, bytes | of fp32 | accuracy, % | agreement, % "
        "| largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        own = line.found
        size = line.file_bytes or own.bytes
        weights = f"{own.bytes:,}" if line.file_bytes is None else "-"
        file = "-" if line.file_bytes is None else f"{line.file_bytes:,}"
        shown.append(
            f"| {line.format} | {weights} | {file} | {size / full.bytes:.2f} "
            f"| {100 * own.scores.values['accuracy']:.2f} | {100 * (own.agreement or 0):.2f} "
            f"| {own.largest_difference:.1e} |"
        )
    return [*shown, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("HPDIST_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.process_time()
    text = [
        "# Bytes and scores of exported files",
        "",
        "`python -m tests.benchmarks.export_sizes`: FixMatch with 50 labels in a class, one seed "
        "and a few steps in fp32, so that nothing is ranked and the accuracies are those of a "
        "beginning. "
        "Every line of a table is measured on the same rows; agreement and the largest difference "
        "of an output are against torch in fp32. fp16 of torch is simulated on a CPU.",
        "",
    ]
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="hpdist-sizes-") as held:
            values = make(options.data, Path(held))
            lines = measured(train(values, Path(held)), Path(held))
        text += table(name, values["steps"], lines)
        print("\n".join(text[-12:]), flush=True)
    options.out.write_text("\n".join(text))
    print(f"{time.process_time() - began:.0f} s of the processor")


if __name__ == "__main__":
    main()
