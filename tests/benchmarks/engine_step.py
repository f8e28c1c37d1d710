"""Step time on DeepSpeed or FSDP2 against the bare engine: same config and tensors, a lean loop.

    python -m tests.benchmarks.engine_step [--stages 1 2 fsdp2] [--precision fp32] [--labeled 32 96]

FixMatch on an MLP of 2.4 million parameters (on a GPU: WRN-28-10). The two take turns, round by
round, each first every other time, and the ratio is the median over the rounds of one step to the
step beside it, so that what else the machine does weighs on both. On a CPU the precision is fp32,
unless it is named, since not every CPU computes in bf16. The bare loop keeps no teacher, since
neither engine has one to offer, so the ratio includes the sharded teacher, the statistics and the
look for overflow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig
from hpdist.engines import launch
from hpdist.engines.prepare import prepare
from hpdist.models import MLP, WideResNet
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import sharded_by

CLASSES, THRESHOLD = 10, 0.0


def prepared(stage: str, precision: str, rows: int) -> tuple[Any, Any, Any, Tensor]:
    """An engine of its own, and an example of its input."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    how = sharded_by(int(stage) if stage.isdecimal() else stage)
    sharding = launch.ExecutionPlan(precision=precision, **how, micro_batch=rows)
    accelerator = launch.make_accelerator(sharding)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        model: nn.Module = WideResNet(3, CLASSES, 28, 10, norm="group")
        example = torch.randn(1, 3, 32, 32)
    else:
        model, example = MLP(256, [1024, 1024, 1024], CLASSES), torch.randn(1, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = prepare(accelerator, model, optimizer, sharding)
    return accelerator, model, optimizer, example


def bare_loop(
    engine: Any, optimizer: Any, stage: str, precision: str, device: torch.device
) -> Callable[..., None]:
    """The same maths, by hand, on DeepSpeed's engine or torch's."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    by_deepspeed = stage.isdecimal()

    def run(x: Tensor, y: Tensor, u: Tensor) -> None:
        x, y, u = x.to(device, dtype), y.to(device), u.to(device, dtype)
        if stage == "3":  # one fused forward
            logits = engine(torch.cat([x, u, u])).float()
            student, weak = logits[: len(x) + len(u)], logits[len(x) + len(u) :].detach()
        else:
            with torch.no_grad():
                weak = (engine.module if by_deepspeed else engine)(u).float()
            student = engine(torch.cat([x, u])).float()
        confidence, pseudo = weak.softmax(dim=1).max(dim=1)
        losses = F.cross_entropy(student[len(x) :], pseudo, reduction="none")
        unsupervised = (losses * (confidence >= THRESHOLD)).mean()
        loss = F.cross_entropy(student[: len(x)], y) + unsupervised
        if by_deepspeed:
            engine.backward(loss)
            engine.step()
            return
        loss.backward()
        gradients = [parameter.grad for parameter in engine.parameters()]
        norm: Any = nn.utils.get_total_norm(gradients)  # which a trainer clips by and logs
        if norm.full_tensor().isfinite():
            optimizer.step()
        optimizer.zero_grad()

    return run


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    stage: str, precision: str, rounds: int, labeled: int, clock: str
) -> tuple[list[float], ...]:
    """Seconds per step, round by round: (hpdist, bare engine)."""
    now = CLOCKS[clock]
    unlabeled = 7 * labeled
    _, engine, theirs, example = prepared(stage, precision, labeled + unlabeled)
    accelerator, model, optimizer, _ = prepared(stage, precision, labeled + unlabeled)
    device = accelerator.device
    bare = bare_loop(engine, theirs, stage, precision, device)
    views = IdentityViewsConfig().build(0)
    step = SemiSupervisedStep(accelerator, model, optimizer, FixMatch(THRESHOLD), views)

    def ours(x: Tensor, y: Tensor, u: Tensor) -> None:
        ids = torch.arange(len(u))
        step(LabeledBatch(x, y, ids[: len(x)]), UnlabeledBatch(u, ids))

    x = torch.randn(labeled, *example.shape[1:])
    u = torch.randn(unlabeled, *example.shape[1:])
    y = torch.randint(CLASSES, (labeled,))
    times: dict[Callable[..., None], list[float]] = {ours: [], bare: []}
    for number in range(rounds + 3):
        for loop in [ours, bare] if number % 2 else [bare, ours]:
            dist.barrier()
            start = now()
            loop(x, y, u)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:  # the first ones warm up
                times[loop].append(now() - start)
    return times[ours], times[bare]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    half = "bf16" if torch.cuda.is_available() else "fp32"
    parser.add_argument("--stages", nargs="+", default=["1", "2", "3", "fsdp2", "fsdp2 whole"])
    parser.add_argument("--precision", nargs="+", default=[half])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: rank 0's processor time, without waits, where a machine has other work",
    )
    parser.add_argument(
        "--labeled",
        type=int,
        nargs="+",
        default=[32, 96],
        help="rows per rank; unlabelled: 7 times",
    )
    options = parser.parse_args()
    what = f"{options.ranks} ranks, {options.rounds} rounds, {options.clock} time"
    print(f"FixMatch, {what}, +- one standard error.\n")
    print("| rows per rank | stage | precision | hpdist, ms | bare, ms | ratio (quartiles) |")
    print("|---|---|---|---|---|---|")
    for labeled, stage, precision in product(options.labeled, options.stages, options.precision):
        arguments = (stage, precision, options.rounds, labeled, options.clock)
        ours, bare = run_ranks(options.ranks, measure, *arguments, timeout=3600)[0]
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        error = 0.93 * (high - low) / len(ratios) ** 0.5  # of a median, by the quartiles
        print(
            f"| {labeled} + {7 * labeled} | {stage} | {precision} "
            f"| {1000 * statistics.median(ours):.1f} | {1000 * statistics.median(bare):.1f} "
            f"| {median:.3f} +- {error:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
