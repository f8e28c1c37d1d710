"""Bytes of model state per rank, teacher included, in every stage, against the formula.

    python -m tests.benchmarks.model_state [--ranks 1 2 4]

Counted, not estimated: every tensor storage alive on the rank between backward and optimizer
step of the second step, less what was alive before the model was made. The formula is that of fp16
AdamW: weights 2, gradients 2, master and moments 12, teacher 4 bytes per parameter, each divided by
the ranks where the stage shards it; without DeepSpeed weights and gradients are fp32 (4 + 4) and
there is no second copy of the weights (moments 8). DeepSpeed's buckets and the weights that ZeRO-3
keeps gathered are of a fixed size that its config sets; they are set to next to nothing here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig
from hpdist.engines import launch
from hpdist.models import MLP
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks

STAGES = [None, 0, 1, 2, 3]
SMALL_BUFFERS = {
    "reduce_bucket_size": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
FEATURES, HIDDEN, ROWS = 256, [256] * 32, 2  # many layers: a whole gradient of one may be alive


def alive() -> int:
    """Bytes of all tensor storages that are alive, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            found = [thing, thing.grad] if thing.is_leaf else [thing]
            found.append(getattr(thing, "ds_tensor", None))
            for tensor in found:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def formula(stage: int | None, ranks: int) -> float:
    """Bytes per parameter."""
    if stage is None:
        return 4 + 4 + 8 + 4 / ranks
    weights = 2 / ranks if stage == 3 else 2
    gradients = 2 / ranks if stage >= 2 else 2
    optimizer = 12 / ranks if stage >= 1 else 12
    return weights + gradients + optimizer + 4 / ranks


def measure(stage: int | None) -> tuple[float, int]:
    """Bytes per parameter on this rank, and the number of parameters."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"zero_optimization": SMALL_BUFFERS}, file)
        file.flush()
        accelerator = launch.make_accelerator(
            launch.ExecutionPlan(
                precision="fp16", stage=stage, micro_batch=2 * ROWS, deepspeed=file.name
            )
        )
    before = alive()
    model = MLP(FEATURES, HIDDEN, 10)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    views = IdentityViewsConfig().build(0)
    step = SemiSupervisedStep(accelerator, model, optimizer, FixMatch(0.0), views, precision="fp16")
    seen: list[int] = []
    apply = step.engine._apply

    def looked_at(clip: float | None) -> tuple[bool, float | None]:
        seen.append(alive() - before)
        return apply(clip)

    step.engine._apply = looked_at  # type: ignore[method-assign]
    ids = torch.arange(ROWS)
    labeled = LabeledBatch(torch.randn(ROWS, FEATURES), ids, ids)
    unlabeled = UnlabeledBatch(torch.randn(ROWS, FEATURES), ids)
    while len(seen) < 2 or step.applied_steps < 2:
        step(labeled, unlabeled)
    return seen[-1] / parameters, parameters


def measure_all() -> dict[int | None, tuple[float, int]]:
    return {stage: measure(stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    rows = []
    for ranks in parser.parse_args().ranks:
        results = run_ranks(ranks, measure_all, timeout=900)
        for stage in STAGES:
            largest = max(result[stage][0] for result in results)
            rows.append((ranks, stage, largest, formula(stage, ranks), results[0][stage][1]))
    print(f"fp16, AdamW, an MLP of {rows[0][4]:,} parameters, largest of all ranks.\n")
    print("| ranks | stage | bytes per parameter | formula | ratio |")
    print("|---|---|---|---|---|")
    for ranks, stage, measured, expected, _ in rows:
        name = "DDP" if stage is None else f"ZeRO-{stage}"
        ratio = measured / expected
        print(f"| {ranks} | {name} | {measured:.2f} | {expected:.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
