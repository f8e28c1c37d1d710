"""Training steps on a GPU in fp32, bf16 and fp16, without sharding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hpdist.engines.config import LossScale
from hpdist.train.step import SemiSupervisedStep
from tests.gpu.device import accelerator_on, is_dry_run, on_cpu
from tests.support.catalogue import build
from tests.support.recipes import global_batches, make_step, train

CPU = torch.device("cpu")
STEPS = 12 if is_dry_run() else 40
FIRST_LOSS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
"""How far, as a share, the first loss may be from that in fp32 on the CPU."""


def step_in(precision: str, device: torch.device, **options: Any) -> SemiSupervisedStep:
    algorithm = build("freematch", device)
    return make_step(algorithm, norm="batch", smooth=True, precision=precision, **options)


@pytest.fixture(scope="module")
def first_loss() -> float:
    """The first loss in fp32 on the CPU."""
    accelerator = accelerator_on(CPU)
    step = make_step(build("freematch"), norm="batch", smooth=True, accelerator=accelerator)
    return train(step, 1)[0]["supervised_loss"]


@pytest.mark.parametrize("precision", FIRST_LOSS)
def test_a_model_learns(precision: str, device: torch.device, first_loss: float) -> None:
    step = step_in(precision, device, lr=0.03)
    assert step.engine.device.type == device.type
    curve = train(step, STEPS)
    applied = [record for record in curve if record["applied"]]
    assert len(applied) >= STEPS - 2  # the first loss scale may be too large
    assert all(math.isfinite(record["loss"]) for record in applied)
    assert curve[0]["supervised_loss"] == pytest.approx(first_loss, rel=FIRST_LOSS[precision])
    losses = [record["supervised_loss"] for record in applied]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(p.dtype == torch.float32 for p in step.engine.module.parameters())


def test_a_step_that_overflows_changes_nothing(device: torch.device) -> None:
    scale = LossScale(initial=2.0**40)
    step = step_in("fp16", device, loss_scale=scale)
    assert step.teacher is not None
    before = on_cpu(step.engine.module.state_dict())
    outcome = step(*global_batches(0))
    assert (outcome.applied, outcome.overflowed) == (False, True)
    assert outcome.new_scale == outcome.old_scale / 2 == scale.initial / 2
    assert outcome.overflow_source is not None
    assert (step.attempts, step.applied_steps, step.teacher.updates) == (1, 0, 0)
    after = on_cpu(step.engine.module.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
