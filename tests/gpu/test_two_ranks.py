"""Two ranks that share a GPU, over gloo: the losses and weights of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.device import accelerator_on, gloo_accelerator, on_cpu, on_ranks, the_device
from tests.support.catalogue import build
from tests.support.recipes import make_step, train

STEPS = 3
NAMES = ("freematch", "simmatch", "mean_teacher")
Found = dict[str, tuple[list[dict[str, Any]], dict[str, Tensor]]]


def curves(*, alone: bool) -> Found:
    """The metrics of each algorithm's steps, and the weights after them."""
    found = {}
    for name in NAMES:
        accelerator = accelerator_on(the_device()) if alone else gloo_accelerator()
        algorithm = build(name, the_device())
        step = make_step(algorithm, norm="batch", smooth=True, accelerator=accelerator)
        assert step.engine.device.type == the_device().type
        assert step.engine.world_size == (1 if alone else 2)
        found[name] = train(step, STEPS), on_cpu(step.engine.module.state_dict())
    return found


def curves_of_two() -> Found:
    return curves(alone=False)


@pytest.fixture(scope="module")
def of_two() -> list[Found]:
    return on_ranks(curves_of_two, 2)


@pytest.fixture
def of_one(device: torch.device) -> Found:
    return curves(alone=True)


def test_two_ranks_have_the_curve_of_one(of_two: list[Found], of_one: Found) -> None:
    for name in NAMES:
        wanted, weights = of_one[name]
        for curve, own_weights in (found[name] for found in of_two):
            for one, other in zip(curve, wanted, strict=True):
                assert one["applied"]
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-3), name
            for key, value in weights.items():
                torch.testing.assert_close(
                    own_weights[key], value, rtol=1e-3, atol=1e-3, msg=f"{name}: {key}"
                )
        assert len({record["loss"] for record in wanted}) == STEPS
