"""The optimizer and the learning rate, both owned here, so that a skipped step moves neither."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hpdist.config import Optim, Schedule


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """Make the optimizer; parameters of fewer than two dimensions do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_all or p.dim() >= 2]
    others = [p for p in parameters if not (config.decay_all or p.dim() >= 2)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


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
