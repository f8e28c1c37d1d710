"""The optimizer and the learning rate, both owned here, so that a skipped step moves neither."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hpdist.train.optim import Optim, Schedule


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
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def state_keys(config: Optim) -> tuple[str, ...]:
    """The names of the state that the optimizer keeps of each element, and goes by."""
    if config.name == "sgd":
        return ("momentum_buffer",) if config.momentum > 0 else ()
    return ("exp_avg", "exp_avg_sq")


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
