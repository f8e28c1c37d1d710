"""Every algorithm and add-on: a step on the GPU is that on the CPU from the same state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.device import accelerator_on, moved
from tests.support import lockstep
from tests.support.catalogue import NAMES, make
from tests.support.lockstep import Step

POINTS = (0, 1, 3)
TOLERANCE = 5e-4
"""Of a metric, and of the length of an update: the sums of convolutions are in another order."""


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    cpu = torch.device("cpu")
    reference = make(name, smooth=True, accelerator=accelerator_on(cpu))
    recorded = lockstep.record(reference, POINTS, tolerance=TOLERANCE)
    step = make(name, smooth=True, accelerator=accelerator_on(device), device=device)
    assert next(step.engine.module.parameters()).device.type == device.type
    for number, wanted in recorded.firm.items():
        lockstep.put(step, moved(wanted.before, device))
        metrics = lockstep.do(step, number)
        done = Step(wanted.before, metrics, moved(lockstep.state_of(step), cpu))
        found = lockstep.differences(done, wanted, TOLERANCE)
        assert found == [], f"step {number}"


def test_another_step_is_told_apart(device: torch.device) -> None:
    """The comparison itself: rows of another step are no rounding."""
    step = make("freematch", smooth=True, accelerator=accelerator_on(device), device=device)
    before = lockstep.state_of(step)
    wanted = Step(before, lockstep.do(step, 0), lockstep.state_of(step))
    lockstep.put(step, before)
    again = Step(before, lockstep.do(step, 0), lockstep.state_of(step))
    assert lockstep.differences(again, wanted, TOLERANCE) == []
    lockstep.put(step, before)
    other = replace(wanted, metrics=lockstep.do(step, 1), after=lockstep.state_of(step))
    assert lockstep.differences(other, wanted, TOLERANCE) != []
