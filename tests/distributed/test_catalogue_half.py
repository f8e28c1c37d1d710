"""Every algorithm trains in fp16 under ZeRO-2 and ZeRO-3, on a curve close to the one in fp32."""

from __future__ import annotations

import pytest

from hpdist.config import LossScale, component_names
from tests.catalogue import finite, run
from tests.ranks import run_ranks

STEPS = 5
Curves = dict[str, list[dict[str, float]]]


def curves(stage: int | None, precision: str) -> Curves:
    scale = LossScale(initial=2.0**8)
    return {
        name: run(name, STEPS, stage=stage, precision=precision, loss_scale=scale)
        for name in component_names("algorithm")
    }


@pytest.fixture(scope="module")
def reference() -> Curves:
    return run_ranks(1, curves, None, "fp32")[0]


@pytest.fixture(scope="module", params=[2, 3])
def half(request: pytest.FixtureRequest) -> Curves:
    return run_ranks(2, curves, request.param, "fp16")[0]


@pytest.mark.parametrize("name", component_names("algorithm"))
def test_the_curve_is_that_of_fp32(reference: Curves, half: Curves, name: str) -> None:
    assert finite(half[name])
    assert all(record["applied"] for record in half[name][:-1])
    losses = [record["loss"] for record in half[name][:-1]]
    expected = [record["loss"] for record in reference[name][:-1]]
    assert losses == pytest.approx(expected, rel=0.03, abs=0.01)
