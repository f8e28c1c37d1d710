"""The optimizer's groups and the learning rate's course."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hpdist.train.optim import Optim, Schedule, build_optimizer, l1_norm, learning_rate


def test_biases_and_norms_do_not_decay_unless_asked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, others = build_optimizer(model, Optim(weight_decay=0.1)).param_groups
    assert [p.dim() for p in decayed["params"]] == [4, 2]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 4
    (everything,) = build_optimizer(model, Optim(decay_all=True)).param_groups
    assert len(everything["params"]) == 6


def test_sgd_without_momentum_is_plain() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, Optim(momentum=0, weight_decay=0, lr=0.5))
    before = model.weight.detach().clone()
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 1)


def test_the_l1_norm_is_of_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).half()
    norm = l1_norm(model.parameters())
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(model[0].weight.float().abs().sum().item())
    assert l1_norm([torch.ones(2)]) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_every_optimizer_is_torchs(name: str, kind: type) -> None:
    assert type(build_optimizer(nn.Linear(2, 2), Optim(name=name))) is kind


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizer(model, Optim()).param_groups
    assert len(group["params"]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.0, 0.02]),
        ("cosine", [2.0, 1.0, 2 * 0.5 * (1 + math.cos(math.pi * 0.99))]),
        (
            "fixmatch_cosine",
            [2.0, 2 * math.cos(7 * math.pi / 32), 2 * math.cos(6.93 * math.pi / 16)],
        ),
    ],
)
def test_schedules(name: str, expected: list[float]) -> None:
    config = Schedule(name=name)
    assert [learning_rate(config, 2.0, s, 100) for s in (0, 50, 99)] == pytest.approx(expected)


def test_warmup_rises_and_then_the_schedule_begins() -> None:
    config = Schedule(name="linear", warmup_steps=4)
    rates = [learning_rate(config, 1.0, step, 8) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
