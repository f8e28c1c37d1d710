"""DeepSpeed's ZeRO on a GPU, one rank with NCCL: the curve of the plain engine, in half precision.

The ranks of a process group on several GPUs are not tested here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpdist.engines.config import LossScale
from tests.gpu.device import on_ranks, the_device
from tests.support.catalogue import build
from tests.support.recipes import make_step, train

STEPS = 4
SETUPS = [(None, "bf16"), (None, "fp16"), (1, "fp16"), (2, "bf16"), (2, "fp16"), (3, "bf16")]
SETUPS += [(3, "fp16"), (None, "fp32"), (2, "fp32")]
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
"""Of a loss, as a share: weights that DeepSpeed rounds, autocast rounds only in products."""
SCALE = LossScale(initial=2.0**8)  # with which no step overflows
OF_A_STEP = ("supervised_loss", "loss")


def curves() -> dict[tuple[int | None, str], list[dict[str, Any]]]:
    """The curve of every set-up, on this rank, which must be the only one."""
    found = {}
    for stage, precision in SETUPS:
        algorithm = build("fixmatch", the_device())
        options: dict[str, Any] = {"stage": stage, "precision": precision, "loss_scale": SCALE}
        step = make_step(algorithm, norm="batch", smooth=True, **options)
        assert step.engine.device.type == the_device().type
        found[stage, precision] = train(step, STEPS)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[int | None, str], list[dict[str, Any]]]:
    (result,) = on_ranks(curves, 1)
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize(("stage", "precision"), [pair for pair in SETUPS if pair[0] is not None])
def test_zero_has_the_curve_of_the_plain_engine(
    found: dict[Any, Any], stage: int, precision: str, device: torch.device
) -> None:
    sharded, plain = found[stage, precision], found[None, precision]
    assert all(record["applied"] for record in (*sharded, *plain))
    for one, other in zip(sharded, plain, strict=True):
        for name in OF_A_STEP:
            assert one[name] == pytest.approx(other[name], rel=TOLERANCE[precision]), name
    assert len({record["loss"] for record in sharded}) == STEPS
