"""Every algorithm and add-on trains in fp16 under ZeRO-2 and ZeRO-3, close to its curve in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hpdist.engines.config import LossScale
from tests.support.catalogue import CASES, finite, run
from tests.support.ranks import run_ranks
from tests.support.sampling import selected

STEPS = 5
Curves = dict[str, list[dict[str, float]]]


def curves(names: Sequence[str], stage: int | None, precision: str) -> Curves:
    scale = LossScale(initial=2.0**8)
    return {
        name: run(name, STEPS, stage=stage, precision=precision, loss_scale=scale) for name in names
    }


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[int | None, Curves]:
    """The curves by stage; those without are in fp32, on one rank."""
    cases = selected(request, "name", "stage")
    found = {
        None: run_ranks(1, curves, sorted({n for n, _ in cases}), None, "fp32", timeout=900)[0]
    }
    for stage in sorted({stage for _, stage in cases}):
        names = [name for name, its in cases if its == stage]
        found[stage] = run_ranks(2, curves, names, stage, "fp16", timeout=900)[0]
    return found


@pytest.mark.sampled(rows="name", columns="stage", share=0.5)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_that_of_fp32(found: dict[int | None, Curves], name: str, stage: int) -> None:
    half, reference = found[stage][name], found[None][name]
    assert finite(half)
    assert all(record["applied"] for record in half[:-1])
    losses = [record["loss"] for record in half[:-1]]
    expected = [record["loss"] for record in reference[:-1]]
    assert losses == pytest.approx(expected, rel=0.03, abs=0.01)
