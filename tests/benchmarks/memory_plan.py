"""What `hpdist plan` says of a stage against what real runs of it held at their peak.

    python -m tests.benchmarks.memory_plan [--ranks 1 2 4] [--out FOLDER]

FixMatch on digits in bf16, with an MLP of 25 million weights under AdamW, whose states dwarf its
activations, and with a CNN of 1 million under SGD, of which the opposite is true. A real run is one
of gloo ranks, three steps and the evaluation of all test rows; its tensors are counted by the same
meter, and beside them the kernel says by how much the process grew.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from hpdist.data.samples.digits import write_digits
from hpdist.plan.memory_meter import MemoryMeter
from hpdist.plan.memory_plan import StagePlan, rehearsed
from hpdist.train import config
from hpdist.train.trainer import Trainer
from tests.support.memory import free_at_once, status
from tests.support.ranks import run_ranks

STAGES = (None, 1, 2, 3, "fsdp2")
_TRIES = 4
MODELS: dict[str, dict[str, Any]] = {
    "MLP": {
        "model": {"name": "mlp", "hidden": [4096, 4096, 2048]},
        "optim": {"name": "adamw", "lr": 1e-3},
    },
    "CNN": {"model": {"name": "cnn", "width": 64}, "optim": {"name": "sgd", "lr": 0.1}},
    "small MLP": {
        "model": {"name": "mlp", "hidden": [1024, 1024]},
        "optim": {"name": "adamw", "lr": 1e-3},
    },
    "small CNN": {"model": {"name": "cnn", "width": 16}, "optim": {"name": "sgd", "lr": 0.1}},
}
LARGE = ("MLP", "CNN")
"""The models of the table; the others are a tenth of their size."""


def settings(folder: Path, model: str, stage: int | str | None) -> dict[str, Any]:
    """The config of a run on digits in this folder."""
    train = {"path": "parquet", "data_files": f"{folder}/train-*.parquet"}
    return {
        "run": {"dir": str(folder / "runs")},
        "data": {
            "labeled": train | {"labels_per_class": 4},
            "unlabeled": train | {"streaming": True},
            "test": train | {"data_files": f"{folder}/test-*.parquet"},
        },
        "batch": {"labeled": 64, "unlabeled": 448},
        "views": {"weak": {"shift": 0.125, "flip": False}},
        "algorithm": {"name": "fixmatch"},
        "precision": "bf16",
        **({"shard": {"engine": stage}} if isinstance(stage, str) else {"zero": {"stage": stage}}),
        "tracker": {"name": "none"},
        "steps": 3,
    } | MODELS[model]


def real_peak(values: dict[str, Any]) -> tuple[int, int]:
    """On a rank of a real run: bytes of tensors at the peak, and bytes that the process grew by."""
    import deepspeed  # noqa: F401  (before the process is measured, as all that is imported)

    free_at_once()
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    with MemoryMeter(torch.device("cpu")) as meter:
        meter.mark("run")
        Trainer.from_config(config.parse(values), files=False).fit()
    return meter.peak, status("VmHWM") - resident


def compare(folder: Path, model: str, stage: int | str | None, ranks: int) -> tuple[int, int, int]:
    """Bytes: of the plan, of a real run's tensors, and of what its process grew by."""
    values = settings(folder, model, stage)
    planned = rehearsed(config.parse(values).model_dump(mode="json"), ranks, stage)
    assert planned.rehearsal is not None, planned.problem
    # Ranks are alike, but what a thread of gloo frees stays counted for some, now and then: no
    # measurement is below the truth, so the least of several is the best.
    tensors, grown = 2**63, 0
    for _ in range(_TRIES):
        found = run_ranks(ranks, real_peak, values, timeout=900)
        tensors = min(tensors, *(held for held, _ in found))
        grown = max(grown, *(more for _, more in found))
        if planned.rehearsal.peak > 0.95 * tensors:
            break
    return planned.rehearsal.peak, tensors, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "# What `hpdist plan` says, and what runs take",
        "",
        "| model | ranks | stage | planned, MB | a run's tensors, MB | planned / run | "
        "its process grew by, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder)
        for model in LARGE:
            for ranks in options.ranks:
                for stage in STAGES:
                    planned, tensors, grown = compare(folder, model, stage, ranks)
                    numbers = f"{planned / 1e6:.0f} | {tensors / 1e6:.0f} | {planned / tensors:.3f}"
                    kind = "none" if stage is None else StagePlan(stage, None).name
                    lines.append(f"| {model} | {ranks} | {kind} | {numbers} | {grown / 1e6:.0f} |")
                    print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        (options.out / "memory_plan.md").write_text(text)


if __name__ == "__main__":
    main()
