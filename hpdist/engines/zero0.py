"""DeepSpeed's stage 0 behind the engine: nothing is sharded."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.distributed.fragments import Elements
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import HasWholeState, WholeState
from hpdist.engines.zero import ZeroEngine


class UnshardedEngine(HasWholeState, ZeroEngine):
    """Stage 0: everything whole on every rank; DeepSpeed keeps fp32 copies of half weights."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        self._masters: dict[str, Tensor] = {**self._parameters}
        wrapped = self.deepspeed.optimizer
        if hasattr(wrapped, "fp32_groups"):
            names = {parameter: name for name, parameter in self._parameters.items()}
            for halves, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                for half, master in zip(halves, masters, strict=True):
                    if half.dim() == 0:
                        _without_dimensions(master, wrapped.optimizer)
                    self._masters[names[half]] = master
        self._whole = WholeState(self._masters, wrapped, self.rank, self.world_size)

    @torch.no_grad()
    def load_master(self, saved: Elements) -> None:
        """Copy into the fp32 copies and the half-precision weights."""
        self._whole.load_tensors(saved)
        for name, master in self._masters.items():
            self._parameters[name].copy_(master)

    def backward(self, loss: Tensor) -> None:
        """Scale the loss here: DeepSpeed unscales the gradients, but forgets to scale the loss.

        DeepSpeed sees a scale of 1 meanwhile, so that a version without this bug still works
        (https://github.com/deepspeedai/DeepSpeed/pull/8393).
        """
        self._set_scale(1.0)
        super().backward(loss * self.loss_scale)

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Let DeepSpeed apply, unless a gradient is not finite; in fp32 it would not check."""
        self._set_scale(self.loss_scale)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        finite = math.isfinite(norm)
        if not finite and self._dtype == torch.float32:
            for parameter in self._parameters.values():
                parameter.grad = None  # so that the optimizer skips it
        self.deepspeed.step()
        return finite and bool(self.deepspeed.was_step_applied()), norm

    def _take_over_scale(self) -> None:
        """Own the loss scale, which stage 0 keeps elsewhere."""
        wrapped = self.deepspeed.optimizer
        theirs = getattr(wrapped, "loss_scale_config", None)
        if self._dtype != torch.float16 or theirs is None:
            return
        self.scaler = LossScaler(
            scale=float(theirs.cur_scale),
            growth_interval=theirs.scale_window or 1,
            minimum=theirs.min_loss_scale or 1,
            dynamic=bool(theirs.dynamic_loss_scale),
        )
        wrapped._update_scale = lambda skip: None

    def _publish_scale(self) -> None:
        self._set_scale(self.loss_scale)

    def _set_scale(self, scale: float) -> None:
        if self.scaler is not None:
            self.deepspeed.optimizer.loss_scale_config.cur_scale = scale


def _without_dimensions(master: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Give a copy and its state the shape of its weight: DeepSpeed made them `with_dimensions`."""
    master.grad = None
    master.data = master.data.view(())
    state = optimizer.state.get(master, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == (1,):
            state[key] = value.view(())
