"""Step time of hpdist against a bare PyTorch loop with the same maths on the same tensors.

    python -m tests.benchmarks.step_time [--rounds 8] [--precision fp32 bf16]

FixMatch on WRN-28-2, batch 8 with mu 7, one process. The two take turns, step by step, so that the
ratio holds when the machine's speed drifts; the order within a round alternates.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import ImageViewsConfig
from hpdist.data.views.base import Views
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.engines.config import Precision
from hpdist.models import WideResNet
from hpdist.train.step import SemiSupervisedStep

BATCH, MU, CLASSES = 8, 7, 10
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
THRESHOLD = 0.3  # so that some rows pass with untrained weights


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


class BareLoop:
    """What one would write by hand: no classes between the tensors and torch."""

    def __init__(
        self, model: nn.Module, views: Views, precision: str, device: torch.device
    ) -> None:
        self.model = model.to(device)
        self.views = views
        self.device = device
        self.optimizer = optimizer_of(model)
        self.teacher = [p.detach().clone() for p in model.parameters()]
        self.buffers = [b.detach().clone() for b in model.buffers()]
        self.half = HALVES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor, u: Tensor) -> None:
        x, y, u = x.to(self.device), y.to(self.device), u.to(self.device)
        at = {"step": self.count}
        labeled, unlabeled = torch.arange(len(x)), torch.arange(len(u))
        with torch.no_grad():
            weak_x = self.views.weak(x, stream="labeled", positions=labeled, **at)
            weak_u = self.views.weak(u, stream="unlabeled", positions=unlabeled, **at)
            strong_u = self.views.strong(u, stream="unlabeled", positions=unlabeled, **at)
            with self.autocast():
                logits = self.model(weak_u.contiguous(memory_format=torch.channels_last))
            confidence, pseudo = logits.float().softmax(dim=1).max(dim=1)
        student = torch.cat([weak_x, strong_u]).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.model(student)
        logits = logits.float()
        losses = F.cross_entropy(logits[len(x) :], pseudo, reduction="none")
        unsupervised = (losses * (confidence >= THRESHOLD)).mean()
        loss = F.cross_entropy(logits[: len(x)], y) + unsupervised
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.teacher, list(self.model.parameters()), 1e-3)
            for mine, buffer in zip(self.buffers, self.model.buffers(), strict=True):
                mine.lerp_(buffer, 1e-3) if mine.is_floating_point() else mine.copy_(buffer)
        self.count += 1

    def autocast(self):  # type: ignore[no-untyped-def]
        if self.half is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)


def hpdist_loop(model: nn.Module, views: Views, precision: Precision) -> Callable[..., None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the precision before
    # Accelerate does not know fp16 on a CPU; the engine computes in it by itself.
    by_engine = precision == "fp32" or (precision == "fp16" and not torch.cuda.is_available())
    accelerator = Accelerator(mixed_precision="no" if by_engine else precision)
    prepared, optimizer = accelerator.prepare(global_batch_norm(model), optimizer_of(model))
    step = SemiSupervisedStep(
        accelerator, prepared, optimizer, FixMatch(THRESHOLD), views, precision=precision
    )

    def run(x: Tensor, y: Tensor, u: Tensor) -> None:
        step(LabeledBatch(x, y, torch.arange(len(x))), UnlabeledBatch(u, torch.arange(len(u))))

    return run


def measure(precision: Precision, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step, round by round: (hpdist, bare loop)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = WideResNet(3, CLASSES)
    views = ImageViewsConfig().build(0)
    bare = BareLoop(copy.deepcopy(model), views, precision, device)
    ours = hpdist_loop(model, views, precision)
    x = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(CLASSES, (BATCH,))
    u = torch.randint(256, (BATCH * MU, 3, 32, 32), dtype=torch.uint8)
    times: dict[Callable[..., None], list[float]] = {ours: [], bare: []}
    for number in range(rounds + 2):
        for loop in [ours, bare] if number % 2 else [bare, ours]:
            start = time.perf_counter()
            loop(x, y, u)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                times[loop].append(time.perf_counter() - start)
    return times[ours], times[bare]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    print(
        "| precision | hpdist, s/step | bare loop, s/step | ratio by round: median (min to max) |"
    )
    print("|---|---|---|---|")
    for precision in arguments.precision:
        ours, bare = measure(precision, arguments.rounds)
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        print(
            f"| {precision} | {statistics.median(ours):.3f} | {statistics.median(bare):.3f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
