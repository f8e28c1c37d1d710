"""FixMatch on pictures by hand and by hpdist: what benchmarks hold against each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction
from torch.nn.parallel import DistributedDataParallel

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views.base import Views
from hpdist.distributed.batch_norm import batch_norms, global_batch_norm
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.engines import launch
from hpdist.train.step import SemiSupervisedStep
from tests.support.sync_batch_norm import register_reference_kernels

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
THRESHOLD = 0.3  # so that some rows pass with untrained weights
Loop: TypeAlias = Callable[[Tensor, Tensor, Tensor], Any]
Norms: TypeAlias = Literal["torch", "synced", "hpdist"]


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
    """What one would write by hand: no classes between the tensors and torch.

    Args:
        model: With torch's BatchNorm.
        views: Of the rows.
        norms: What replaces it: nothing, torch's SyncBatchNorm, or hpdist's.
        precision: fp32, bf16 or fp16.
    """

    def __init__(
        self, model: nn.Module, views: Views, norms: Norms = "torch", precision: str = "fp32"
    ) -> None:
        if norms == "synced":
            register_reference_kernels()
            model = with_synced_norms(model)
        elif norms == "hpdist":
            model = global_batch_norm(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = self.model = model.to(self.device)
        self.running = RunningStatistics(batch_norms(model))
        self.rank = dist.get_rank() if several_ranks() else 0
        if several_ranks():
            self.model = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.views = views
        self.half = HALVES.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.optimizer = optimizer_of(self.module)
        self.teacher = [p.detach().clone() for p in self.module.parameters()]
        self.buffers = [b.clone() for b in self.module.buffers() if b.is_floating_point()]
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor, u: Tensor) -> None:
        """Do one step on this rank's rows."""
        x, y, u = x.to(self.device), y.to(self.device), u.to(self.device)
        labeled, unlabeled = (torch.arange(len(t)) + self.rank * len(t) for t in (x, u))
        at = {"step": self.count}
        with torch.no_grad():
            weak_x = self.views.weak(x, stream="labeled", positions=labeled, **at)
            weak_u = self.views.weak(u, stream="unlabeled", positions=unlabeled, **at)
            strong_u = self.views.strong(u, stream="unlabeled", positions=unlabeled, **at)
            with self.autocast():
                logits = self.module(weak_u.contiguous(memory_format=torch.channels_last))
            confidence, pseudo = logits.float().softmax(dim=1).max(dim=1)
        student = torch.cat([weak_x, strong_u]).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.model(student)
        logits = logits.float()
        losses = F.cross_entropy(logits[len(x) :], pseudo, reduction="none")
        unsupervised = (losses * (confidence >= THRESHOLD)).mean()
        loss = F.cross_entropy(logits[: len(x)], y) + unsupervised
        if self.scaler.is_enabled():
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.running.commit()
        with torch.no_grad():
            torch._foreach_lerp_(self.teacher, list(self.module.parameters()), 1e-3)
            floating = [b for b in self.module.buffers() if b.is_floating_point()]
            torch._foreach_lerp_(self.buffers, floating, 1e-3)
        self.count += 1

    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision, if chosen."""
        if self.half is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)


def several_ranks() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """SGD as in the paper."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


def hpdist_loop(model: nn.Module, views: Views, precision: str = "fp32", **compiled: Any) -> Loop:
    """The same step by hpdist; the model is compiled if there are arguments for that."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the precision before
    accelerator = launch.make_accelerator(launch.ExecutionPlan(precision))  # type: ignore[arg-type]
    model = global_batch_norm(model)
    if compiled:
        model.compile(**compiled)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    step = SemiSupervisedStep(
        *(accelerator, prepared, optimizer, FixMatch(THRESHOLD), views),
        precision=precision,  # type: ignore[arg-type]
    )

    waiting: list[tuple[LabeledBatch, UnlabeledBatch]] = []

    def run(x: Tensor, y: Tensor, u: Tensor) -> None:
        # As the trainer does: the views of the next step are made in this one.
        labeled, unlabeled = LabeledBatch(x, y, torch.arange(len(x))), torch.arange(len(u))
        waiting.append((labeled, UnlabeledBatch(u, unlabeled)))
        step(*(waiting.pop(0) if len(waiting) > 1 else waiting[0]), following=lambda: waiting[-1])

    return run
