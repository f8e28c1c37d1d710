"""The optimizer and the learning rate, both owned here, so that a skipped step changes neither."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from hpdist.config.section import Section
from hpdist.train.muon import AdjustLr, MuonWithAdamW, make_muon

Share = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """Name of an optimizer of torch's; muon is for hidden matrices, with adamw for the rest."""
    lr: float = Field(0.03, gt=0)
    """Learning rate before the schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and muon."""
    nesterov: bool = True
    """Whether sgd and muon use Nesterov's momentum; unused without momentum."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the averages of adam and adamw."""
    eps: float = Field(1e-8, gt=0)
    """Constant that adam and adamw add to the denominator."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay; adamw and muon decouple it from the gradient."""
    adjust_lr_fn: AdjustLr = "match_rms_adamw"
    """Muon's factor on the rate of a matrix [a, b]: original, sqrt(max(1, a / b)); or
    match_rms_adamw, 0.2 sqrt(max(a, b)), with which rates and decay of adamw fit."""
    adamw_lr_factor: float = Field(1.0, gt=0)
    """With muon, the factor on the rate of the parameters that adamw trains."""
    l1: float = Field(0.0, ge=0)
    """Adds this multiple of the weights' summed absolute values to the loss.

    Biases and normalisation weights are left out. Weights approach zero, but seldom reach it.
    Refused where the weights are sharded, by ZeRO-3 or FSDP2.
    """
    decay_all: bool = False
    """Apply weight decay to biases and normalisation weights as well."""
    grad_clip: float | None = Field(None, gt=0)
    """Largest global gradient norm; no clipping by default."""


class Schedule(Section):
    """The learning rate over the applied optimizer steps."""

    name: Literal["cosine", "fixmatch_cosine", "linear", "constant"] = "fixmatch_cosine"
    """cosine and linear end at zero; fixmatch_cosine is cos(7 pi t / 16 T)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0."""


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """Make the optimizer; parameters of fewer than two dimensions do not decay.

    A parameter's own `lr_scale`, if it has one, multiplies its learning rate.
    """
    chosen: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = config.decay_all or parameter.dim() >= 2
            scale = float(getattr(parameter, "lr_scale", 1.0))
            chosen.setdefault((decays, scale), []).append(parameter)
    groups = [
        {
            "params": chosen[decays, scale],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.lr * scale,
            "lr_scale": scale,
        }
        for decays, scale in sorted(chosen, reverse=True)
    ]
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    if config.name == "muon":
        return make_muon(
            model,
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            adjust_lr_fn=config.adjust_lr_fn,
            adamw_lr_factor=config.adamw_lr_factor,
            betas=config.betas,
            eps=config.eps,
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def optimizer_note(optimizer: torch.optim.Optimizer) -> str | None:
    """What the start of a run says of an optimizer that is two; else None."""
    if not isinstance(optimizer, MuonWithAdamW):
        return None
    return f"optimizer: {optimizer.describe()}"


def state_keys(config: Optim) -> tuple[str, ...]:
    """The names of the optimizer's state per element that it uses."""
    if config.name == "sgd":
        return ("momentum_buffer",) if config.momentum > 0 else ()
    moments = ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer", *moments) if config.name == "muon" else moments


def l1_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of the absolute values, fp32, of parameters of two dimensions or more."""
    total = torch.zeros(())
    for parameter in parameters:
        if parameter.dim() >= 2:
            total = total.to(parameter.device) + parameter.float().abs().sum()
    return total


def learning_rate(config: Schedule, lr: float, step: int, steps: int) -> float:
    """The rate of applied step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    if config.name == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.name == "fixmatch_cosine":
        return lr * math.cos(7 * math.pi * done / 16)
    if config.name == "linear":
        return lr * (1 - done)
    return lr
