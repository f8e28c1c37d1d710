"""Operations and collectives that a training step dispatches, against the same step in plain torch.

    python -m tests.benchmarks.dispatch_count [--depth 28] [--width 2] [--by-name]

FixMatch on a WideResNet, batch 8 with mu 7, on one process and on two ranks. Each operation that
reaches a kernel counts as one, whatever its size; views of memory do not count, and collectives
count apart. On two ranks the plain loop is DDP around torch's own SyncBatchNorm. Its fused kernels
exist for GPUs only, so on a CPU each is replaced by a reference implementation that counts as one.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import ImageViewsConfig
from hpdist.data.views.base import Views
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.engines import launch
from hpdist.models import WideResNet
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.sync_batch_norm import register_reference_kernels

BATCH, MU, CLASSES, THRESHOLD = 8, 7, 10, 0.3
_COUNTED_FROM = 2  # steps that make buffers and the optimizer's state come first


@dataclass(frozen=True)
class Dispatched:
    """What one step dispatches, by name."""

    operations: Counter[str]
    collectives: Counter[str]


class DispatchCounter(TorchDispatchMode):
    """Counts what is dispatched inside, except views of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count one operation, and do it."""
        if function.namespace == "c10d":
            self.collectives[str(function)] += 1
        elif function.namespace == "aten" and not function.is_view:
            self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


class SyncedBatchNorm(nn.BatchNorm2d):
    """Torch's SyncBatchNorm, without the check that its input is on a GPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalise by the statistics of all ranks."""
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        group = dist.group.WORLD
        tensors = (input, self.weight, self.bias, self.running_mean, self.running_var)
        function: Any = SyncFunction.apply
        output: Tensor = function(*tensors, self.eps, self.momentum, group, dist.get_world_size())
        return output


def with_synced_norms(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by one that all ranks share."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            synced = SyncedBatchNorm(child.num_features, momentum=child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(model, name, synced)
        with_synced_norms(child)
    return model


class PlainLoop:
    """FixMatch by hand: no classes between the tensors and torch."""

    def __init__(self, model: nn.Module, views: Views) -> None:
        self.module = self.model = model
        if dist.is_initialized() and dist.get_world_size() > 1:
            register_reference_kernels()
            self.module = with_synced_norms(model)
            self.model = DistributedDataParallel(self.module, broadcast_buffers=False)
        self.views = views
        self.optimizer = optimizer_of(self.module)
        self.teacher = [p.detach().clone() for p in self.module.parameters()]
        self.buffers = [b.clone() for b in self.module.buffers() if b.is_floating_point()]
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor, u: Tensor) -> None:
        """Do one step on this rank's rows."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        labeled, unlabeled = (torch.arange(len(rows)) + rank * len(rows) for rows in (x, u))
        at = {"step": self.count}
        with torch.no_grad():
            weak_x = self.views.weak(x, stream="labeled", positions=labeled, **at)
            weak_u = self.views.weak(u, stream="unlabeled", positions=unlabeled, **at)
            strong_u = self.views.strong(u, stream="unlabeled", positions=unlabeled, **at)
            weak = self.module(weak_u.contiguous(memory_format=torch.channels_last))
            confidence, pseudo = weak.softmax(dim=1).max(dim=1)
        student = torch.cat([weak_x, strong_u]).contiguous(memory_format=torch.channels_last)
        logits = self.model(student)
        losses = F.cross_entropy(logits[len(x) :], pseudo, reduction="none")
        unsupervised = (losses * (confidence >= THRESHOLD)).mean()
        (F.cross_entropy(logits[: len(x)], y) + unsupervised).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.teacher, list(self.module.parameters()), 1e-3)
            floating = [b for b in self.module.buffers() if b.is_floating_point()]
            torch._foreach_lerp_(self.buffers, floating, 1e-3)
        self.count += 1


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """SGD as in the paper."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


Loop: TypeAlias = Callable[[Tensor, Tensor, Tensor], Any]


def hpdist_loop(model: nn.Module, views: Views) -> Loop:
    """The same step by hpdist."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = launch.make_accelerator(launch.ExecutionPlan())
    prepared, optimizer = accelerator.prepare(global_batch_norm(model), optimizer_of(model))
    step = SemiSupervisedStep(accelerator, prepared, optimizer, FixMatch(THRESHOLD), views)

    def run(x: Tensor, y: Tensor, u: Tensor) -> None:
        ids = torch.arange(len(u))
        step(LabeledBatch(x, y, ids[: len(x)]), UnlabeledBatch(u, ids))

    return run


@dataclass(frozen=True)
class Compared:
    """What a step dispatches by hpdist and by the plain loop, on this rank."""

    ours: Dispatched
    plain: Dispatched
    difference: float
    """The largest difference between their weights after these steps, of all weights."""


def count(depth: int, width: int, rows: int = BATCH) -> Compared:
    """Do the same steps in both loops, and count the last. Collective, if there are ranks."""
    torch.manual_seed(0)
    model = WideResNet(3, CLASSES, depth, width)
    own, theirs = copy.deepcopy(model), model
    views = ImageViewsConfig().build(0)
    loops = [hpdist_loop(own, views), PlainLoop(theirs, views)]
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(CLASSES, (rows,))
    u = torch.randint(256, (rows * MU, 3, 32, 32), dtype=torch.uint8)
    ours, plain = (_counted(loop, x, y, u) for loop in loops)
    with torch.no_grad():
        pairs = zip(own.parameters(), theirs.parameters(), strict=True)
        difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Compared(ours, plain, difference)


def _counted(loop: Loop, x: Tensor, y: Tensor, u: Tensor) -> Dispatched:
    for _ in range(_COUNTED_FROM):
        loop(x, y, u)
    with DispatchCounter() as counter:
        loop(x, y, u)
    return Dispatched(counter.operations, counter.collectives)


def table(found: dict[int, Compared]) -> str:
    """Return the counts by number of ranks, as Markdown."""
    lines = [
        "| ranks | hpdist, operations | plain torch | ratio | hpdist, collectives | plain torch |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, compared in found.items():
        ours, plain = compared.ours, compared.plain
        own, theirs = ours.operations.total(), plain.operations.total()
        sent = f"{ours.collectives.total()} | {plain.collectives.total()}"
        lines.append(f"| {ranks} | {own:,} | {theirs:,} | {own / theirs:.3f} | {sent} |")
    return "\n".join(lines)


def differences(ours: Dispatched, plain: Dispatched) -> str:
    """Return the counts by name where they differ, the largest difference first."""
    own = ours.operations + ours.collectives
    theirs = plain.operations + plain.collectives
    names = sorted(own.keys() | theirs.keys(), key=lambda name: -abs(own[name] - theirs[name]))
    lines = ["| operation | hpdist | plain torch |", "|---|---|---|"]
    changed = [name for name in names if own[name] != theirs[name]]
    return "\n".join([*lines, *(f"| {n} | {own[n]} | {theirs[n]} |" for n in changed)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--by-name", action="store_true", help="also what differs, by name")
    options = parser.parse_args()
    size = options.depth, options.width
    found = {1: count(*size), 2: run_ranks(2, count, *size, fresh=True)[0]}
    print(f"FixMatch on WRN-{options.depth}-{options.width}, {BATCH} + {BATCH * MU} rows.\n")
    print(table(found))
    if options.by_name:
        for ranks, compared in found.items():
            print(f"\n{ranks} ranks\n\n{differences(compared.ours, compared.plain)}")


if __name__ == "__main__":
    main()
