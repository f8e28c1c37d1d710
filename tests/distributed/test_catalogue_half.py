"""Every algorithm and add-on trains in fp16 under ZeRO-2 and ZeRO-3, close to its curve in fp32."""

from __future__ import annotations

import pytest

from hpdist.config import LossScale
from tests.catalogue import NAMES, finite, run
from tests.ranks import run_ranks

STEPS = 5
Curves = dict[str, list[dict[str, float]]]


def curves(stage: int | None, precision: str) -> Curves:
    scale = LossScale(initial=2.0**8)
    return {
        name: run(name, STEPS, stage=stage, precision=precision, loss_scale=scale) for name in NAMES
    }


@pytest.fixture(scope="module")
def reference() -> Curves:
    return run_ranks(1, curves, None, "fp32")[0]


@pytest.fixture(scope="module", params=[2, 3])
def half(request: pytest.FixtureRequest) -> Curves:
    return run_ranks(2, curves, request.param, "fp16")[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_curve_is_that_of_fp32(reference: Curves, half: Curves, name: str) -> None:
    assert finite(half[name])
    assert all(record["applied"] for record in half[name][:-1])
    losses = [record["loss"] for record in half[name][:-1]]
    expected = [record["loss"] for record in reference[name][:-1]]
    assert losses == pytest.approx(expected, rel=0.03, abs=0.01)
