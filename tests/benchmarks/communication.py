"""Bytes and collectives of a step as ranks go 1, 2, 4, 8, and what follows for large clusters.

    python -m tests.benchmarks.communication [--ranks 1 2 4 8]

Needs root: the ranks run in a network namespace of their own, whose loopback device counts every
byte that they send. FreeMatch on an MLP; collectives are those that torch's profiler sees.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from hpdist.algorithms import FreeMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig
from hpdist.engines import launch
from hpdist.models import MLP
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks

NAMESPACE = "hpcomm"
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
FEATURES, HIDDEN, CLASSES, ROWS = 256, [1024, 1024], 10, 4  # rows of a rank
KINDS: dict[str, tuple[str, int | None]] = {
    "DDP, fp32": ("fp32", None),
    "ZeRO-1, fp16": ("fp16", 1),
    "ZeRO-2, fp16": ("fp16", 2),
    "ZeRO-3, fp16": ("fp16", 3),
}
STEPS, WARM = 4, 3
GPUS, LINE, COMPUTE, SHARE = (8, 64, 512, 4096), 400e9 / 8, 989e12, 0.4
MODELS = {"WRN-28-8": (23.4e6, 5.2e9), "BERT-base": (110e6, 22e9), "ViT-L/16": (304e6, 61.6e9)}
PER_GPU = 64  # rows of a GPU and step that go forward and backward


def parameters() -> int:
    return sum(p.numel() for p in MLP(FEATURES, HIDDEN, CLASSES).parameters())


def predicted(kind: str, ranks: int) -> float:
    """Bytes that a rank sends in a step, by the collectives' best algorithms."""
    share, numbers = (ranks - 1) / ranks, parameters()
    if kind == "DDP, fp32":
        return 2 * share * 4 * numbers  # all-reduce of gradients
    passes = {"ZeRO-1, fp16": 3, "ZeRO-2, fp16": 2, "ZeRO-3, fp16": 3}[kind]
    # Stage 1 all-reduces the gradients (2) and gathers the weights; stage 2 scatters and gathers;
    # stage 3 gathers twice and scatters.
    return passes * share * 2 * numbers


def measure(kind: str) -> tuple[float, int]:
    """Bytes that all ranks send in a step, and collectives of this one."""
    precision, stage = KINDS[kind]
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    sharding = launch.ExecutionPlan(precision=precision, stage=stage, micro_batch=2 * ROWS)  # type: ignore[arg-type]
    accelerator = launch.make_accelerator(sharding)
    torch.manual_seed(0)
    model = MLP(FEATURES, HIDDEN, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    step = SemiSupervisedStep(
        accelerator,
        model,
        optimizer,
        FreeMatch(CLASSES),
        IdentityViewsConfig().build(0),
        precision=precision,  # type: ignore[arg-type]
        decay=None,
    )
    ids = torch.arange(ROWS)
    rows = torch.randn(2, ROWS, FEATURES)
    batches = LabeledBatch(rows[0], ids % CLASSES, ids), UnlabeledBatch(rows[1], ids)
    several = dist.is_initialized() and dist.get_world_size() > 1

    def sent() -> int:
        if several:
            dist.barrier()
        return int(SENT.read_text())

    for _ in range(WARM):
        step(*batches)
    before = sent()
    for _ in range(STEPS):
        step(*batches)
    each = (sent() - before) / STEPS
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step(*batches)
    collectives = sum(event.name.startswith("gloo:") for event in seen.events())
    return each, collectives


def counted(ranks: Sequence[int]) -> None:
    print(
        f"FreeMatch, an MLP of {parameters():,} weights: bytes that a rank sends in a step, TCP's "
        "own included, against what its collectives need at least; and collectives of a step.\n"
    )
    print("| | " + " | ".join(f"{number} ranks" for number in ranks) + " |")
    print("|---|" + "---|" * len(ranks))
    for kind in KINDS:
        cells = []
        for number in ranks:
            sent, collectives = run_ranks(number, measure, kind, timeout=900)[0]
            least = predicted(kind, number)
            ratio = f" ({sent / number / least:.2f})" if least else ""
            cells.append(f"{sent / number / 1e6:.2f} MB{ratio}, {collectives}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    print()


def expected() -> None:
    """Efficiency on paper."""
    print(
        f"On paper: {PER_GPU} rows a GPU and step, {COMPUTE / 1e12:.0f} TFLOP/s a GPU of which "
        f"{SHARE:.0%} are reached, {LINE * 8 / 1e9:.0f} Gbit/s a GPU, ZeRO-2 in half precision: "
        "2 x 2 bytes a weight sent, by rings, of which the gradients' half goes on during the "
        "backward pass (two thirds of the step) and the weights' half does not; 10 us a hop of "
        "the statistics' all-reduce, a tree of log2(GPUs) levels up and down, of which nothing "
        "is hidden.\n"
    )
    print("| | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |")
    print("|---|" + "---|" * len(GPUS))
    for name, (numbers, flops) in MODELS.items():
        compute = 3 * PER_GPU * flops / (COMPUTE * SHARE)
        cells = []
        for gpus in GPUS:
            half = (gpus - 1) / gpus * 2 * numbers / LINE
            levels = 2 * (gpus - 1).bit_length()
            total = max(compute, compute / 3 + half) + half + levels * 10e-6
            cells.append(f"{compute / total:.0%}")
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        counted(options.ranks)
        expected()
        return
    ip = ["ip", "netns"]
    subprocess.run([*ip, "del", NAMESPACE], capture_output=True)
    subprocess.run([*ip, "add", NAMESPACE], check=True)
    try:
        subprocess.run(["ip", "-n", NAMESPACE, "link", "set", "lo", "up"], check=True)
        own = [sys.executable, "-m", "tests.benchmarks.communication", "--inside", "--ranks"]
        subprocess.run([*ip, "exec", NAMESPACE, *own, *map(str, options.ranks)], check=True)
    finally:
        subprocess.run([*ip, "del", NAMESPACE])


if __name__ == "__main__":
    main()
