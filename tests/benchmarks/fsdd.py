"""Spoken digits with 100 labels: algorithms against the labels alone, at equal steps.

    python -m tests.benchmarks.fsdd --data FOLDER_OF_SHARDS [--seeds 5] [--out FILE.md]

One process of one thread, fp32. Also how many rows a second the views make, beside what a training
step takes of them. Prints a table and writes it to `--out`; runs that are done are kept in
`--runs`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpdist.data.decode.audio import Sampling
from hpdist.data.views.audio import AudioViewsConfig
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.benchmarks.seeds import ENOUGH, caveat, with_error

CONFIG = Path(__file__).parents[2] / "configs" / "fsdd_fixmatch.yaml"
RESULTS = Path(__file__).parent / "results" / "fsdd.md"
SMALLER = {
    "model.width": 8,
    "batch.labeled": 16,
    "batch.unlabeled": 48,
    "views.mels": 32,
    "views.hop": 0.02,
    "steps": 400,
    "eval.every": 400,
    "log.every": 50,
    "checkpoint.every": 400,
    "tracker.name": "none",
}
"""What the config leaves out of reach of ten minutes on one core."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "fixmatch": {"threshold": 0.8},
    "freematch": {"momentum": 0.99},
    "softmatch": {"momentum": 0.99},
}


def settings(data: Path, **more: Any) -> configuration.RunConfig:
    values = {
        "data.labeled.data_files.train": f"{data}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{data}/train-*.parquet",
        "data.test.data_files.test": f"{data}/test-*.parquet",
        **SMALLER,
        **more,
    }
    options = [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]
    return configuration.load(CONFIG, options)


def train(data: Path, runs: Path, algorithm: str, seed: int) -> dict[str, float]:
    """One run; its test accuracies, seconds and seconds of the processor."""
    name = f"{algorithm}-{seed}"
    done = runs / f"{name}.json"
    if not done.exists():
        config = settings(
            data,
            algorithm={"name": algorithm, **ALGORITHMS[algorithm]},
            **{"run.seed": seed, "run.dir": str(runs), "run.name": name},
        )
        begun = time.process_time()
        summary = Trainer.from_config(config).fit()
        rates = [json.loads(line) for line in (runs / name / "metrics.jsonl").open()]
        found = {
            "teacher": summary["test/accuracy"],
            "student": summary["test/accuracy_student"],
            "mask": rates[-1].get("mask_rate"),
            "cpu": time.process_time() - begun,
        }
        done.write_text(json.dumps(found))
    read: dict[str, float] = json.loads(done.read_text())
    return read


def throughput(data: Path) -> list[str]:
    """Rows a second: read and decoded, of each view, and of the model's forward and backward."""
    config = settings(data)
    views_config = config.views
    assert isinstance(views_config, AudioViewsConfig)
    trainer = Trainer.from_config(config, files=False)
    stream, labeled = trainer.data.unlabeled_stream, trainer.data.labeled_stream
    assert stream is not None
    batch, sampling = next(stream), trainer.data.spec.sampling
    assert isinstance(sampling, Sampling)
    values = trainer.data.labeled.read_split(trainer.data.labeled.chosen)
    views, positions = trainer.data.views, torch.arange(len(batch))
    noise = {"stream": "unlabeled", "step": 0, "positions": positions}
    seen = views.plain(batch.inputs)
    model = trainer.step.engine.module
    rows_of_a_step = len(labeled_batch := next(labeled)) + 2 * len(batch)
    timed: dict[str, tuple[int, Callable[[], Any]]] = {
        "decoding": (len(values), lambda: trainer.data.spec.decode_rows(values, values, "")),
        "plain": (len(batch), lambda: views.plain(batch.inputs)),
        "weak": (len(batch), lambda: views.weak(batch.inputs, **noise)),
        "strong": (len(batch), lambda: views.strong(batch.inputs, **noise)),
        "the model's forward and backward": (len(seen), lambda: model(seen).sum().backward()),
        "a whole training step": (rows_of_a_step, lambda: trainer.step(labeled_batch, batch)),
    }
    lines = ["| what | rows a second | microseconds a row |", "|---|---|---|"]
    for name, (rows, call) in timed.items():
        seconds = _least_seconds(call)
        lines.append(f"| {name} | {rows / seconds:,.0f} | {1e6 * seconds / rows:.0f} |")
    trainer.data.close()
    return lines


def _least_seconds(call: Callable[[], Any], times: int = 15) -> float:
    """The processor's seconds of the fastest of several calls: others use the machine too."""
    call()
    found = []
    for _ in range(times):
        begun = time.process_time()
        call()
        found.append(time.process_time() - begun)
    return min(found)


def table(runs: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Accuracies, as Markdown."""
    lines = [
        "| algorithm | teacher, % | each seed | student, % | mask rate, end | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        teacher, student = ([100 * seed[key] for seed in seeds] for key in ("teacher", "student"))
        each = ", ".join(f"{accuracy:.1f}" for accuracy in teacher)
        masks = [seed["mask"] for seed in seeds if seed["mask"] is not None]
        mask = f"{statistics.mean(masks):.2f}" if masks else "-"
        lines.append(
            f"| {name} | {with_error(teacher)} | {each} | {with_error(student)} "
            f"| {mask} | {statistics.mean(seed['cpu'] for seed in seeds):.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Parquet shards")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/fsdd"))
    parser.add_argument("--seeds", type=int, default=ENOUGH)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    speed = throughput(options.data)
    found = {
        name: [train(options.data, options.runs, name, seed) for seed in range(options.seeds)]
        for name in ALGORITHMS
    }
    config = settings(options.data)
    changed = "; ".join(f"{name} {values}" for name, values in ALGORITHMS.items() if values)
    lines = [
        "# Spoken digits (FSDD), 100 labels",
        "",
        "`python -m tests.benchmarks.fsdd`: `configs/fsdd_fixmatch.yaml` made smaller: "
        f"{config.steps} steps of {config.batch.labeled} labelled",
        f"and {config.batch.unlabeled} unlabelled rows, a CNN of width 8 on log-mels of "
        f"{config.views.output_shape[1]} x {config.views.output_shape[2]}, fp32, one thread.",
        "10 labels per class of 2,700 recordings, all of which are the unlabelled rows too; 300",
        "others are the test set, one of them 0.33 points. The views' settings, the rate and",
        "FixMatch's threshold were chosen on a quarter of the training recordings, held out, with",
        f"another seed. Settings that differ from the defaults: {changed}.",
        caveat(options.seeds),
        "",
        *table(found),
        "",
        "What the views cost, by the processor's time of one thread:",
        "",
        *speed,
        "",
    ]
    options.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
