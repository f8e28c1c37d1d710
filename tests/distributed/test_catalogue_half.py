"""Every algorithm and add-on trains in fp16 under ZeRO-2 and ZeRO-3, close to its curve in fp32."""

from __future__ import annotations

from functools import cache

import pytest

from hpdist.engines.config import LossScale
from tests.support.catalogue import CASES, PARTS, finite, run
from tests.support.ranks import run_ranks

STEPS = 5
Curves = dict[str, list[dict[str, float]]]


def curves(part: str, stage: int | None, precision: str) -> Curves:
    scale = LossScale(initial=2.0**8)
    return {
        name: run(name, STEPS, stage=stage, precision=precision, loss_scale=scale)
        for name in PARTS[part]
    }


@cache
def on_ranks(ranks: int, part: str, stage: int | None, precision: str) -> Curves:
    return run_ranks(ranks, curves, part, stage, precision, timeout=900)[0]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_the_curve_is_that_of_fp32(part: str, name: str, stage: int) -> None:
    half = on_ranks(2, part, stage, "fp16")[name]
    reference = on_ranks(1, part, None, "fp32")[name]
    assert finite(half)
    assert all(record["applied"] for record in half[:-1])
    losses = [record["loss"] for record in half[:-1]]
    expected = [record["loss"] for record in reference[:-1]]
    assert losses == pytest.approx(expected, rel=0.03, abs=0.01)
