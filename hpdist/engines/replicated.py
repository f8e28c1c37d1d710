"""The engine whose weights are whole on every rank: one process, or several under DDP."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.data.structures import Structure
from hpdist.distributed.fragments import Elements
from hpdist.distributed.module_names import ddp_of, without_wrappers
from hpdist.engines.base import Engine
from hpdist.engines.config import LossScale, Precision
from hpdist.engines.gradient_layout import keep_strides
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import HasWholeState, WholeState
from hpdist.engines.reach import DdpUsage, GradientWatch


class ReplicatedEngine(HasWholeState, Engine):
    """Weights whole and fp32 on every rank, one or under DDP; mixed precision by autocast."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        mixed = accelerator.mixed_precision
        self.precision = precision or ("fp32" if mixed == "no" else mixed)
        # Accelerate wraps the model's forward in autocast, except for fp16 on a CPU.
        self._own_autocast = self.precision == "fp16" and accelerator.mixed_precision == "no"
        if self.precision == "fp16":
            self.scaler = LossScaler.of(loss_scale or LossScale())
        for parameter in self._parameters.values():  # so that a flat view is possible
            parameter.data = parameter.data.contiguous()
        self._whole = WholeState(self._parameters, self.optimizer, self.rank, self.world_size)
        self._usage: DdpUsage | None = None
        ddp = ddp_of(model)
        if ddp is not None:
            keep_strides(self._trained.values())
            self._usage = DdpUsage(ddp, self._trained)
        # Accelerate's autocast wraps its forward, which need not be the one of the user's module.
        self._prepared = model if ddp is None else cast(nn.Module, ddp.module)

    @property
    def module(self) -> nn.Module:
        """The user's own module; do not call it: autocast may wrap a wrapper's forward."""
        # Not by Accelerate's unwrap_model, which imports DeepSpeed to check for it.
        return without_wrappers(self.model)

    def forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, through DDP's wrapper."""
        with self._autocast():
            return self._requested(self.model(inputs))

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32, bypassing DDP's wrapper, which would expect a backward."""
        return self.probe_forward(inputs)

    def probe_forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, with gradient, bypassing DDP's wrapper."""
        with self._autocast():
            return self._requested(self._prepared(inputs))

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Keep DDP from reducing before the last micro-batch."""
        if self._usage is None:
            return nullcontext()
        if last:
            self._usage.begin_last()
            return nullcontext()
        return self._usage.without_reduction()

    def backward(self, loss: Tensor) -> None:
        """DDP averages over ranks, so a contribution counts world-size times."""
        self._require_gradient(loss)
        torch.autograd.backward(loss * (self.world_size * self.loss_scale))
        if self._usage is not None:
            self._usage.complete()

    def _missing(self, watch: GradientWatch) -> list[str]:
        """The parameters that the first step has not reached here; DDP has received zeros since."""
        if self._usage is None:
            return super()._missing(watch)
        return [name for name in self._usage.missing if name in self._parameters]

    @property
    def missed_gradients(self) -> bool:
        """Whether DDP's latest step missed gradients and the ranks do not share usage yet."""
        usage = self._usage
        return usage is not None and bool(usage.missing) and not usage.shared

    def share_usage(self) -> None:
        """Agree in each step from now on what has no gradient. Every rank must call."""
        if self._usage is not None:
            self._usage.shared = True

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """The gradients are reduced, so every rank finds the same norm."""
        if self._usage is not None:
            self._usage.drop_unused()
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self.loss_scale != 1:
            torch._foreach_mul_(gradients, 1 / self.loss_scale)
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total)  # the step's only wait for the device
        finite = math.isfinite(norm)
        if finite:
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), clip, total)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite, norm

    @torch.no_grad()
    def load_master(self, saved: Elements) -> None:
        """Copy into the parameters: each rank reads its share, and has the rest from the others."""
        self._whole.load_tensors(saved)

    def _autocast(self) -> AbstractContextManager[None]:
        if not self._own_autocast:
            return nullcontext()
        return cast(
            AbstractContextManager[None], torch.autocast(self.device.type, dtype=torch.float16)
        )
