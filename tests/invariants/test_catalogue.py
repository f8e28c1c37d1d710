"""Every algorithm and add-on: one curve on 1, 2 and 4 ranks, with and without accumulation."""

from __future__ import annotations

from functools import cache

import pytest

from tests.catalogue import CASES, NORMALISED, PARTS, run
from tests.ranks import run_ranks

STEPS = 6
Curves = dict[tuple[str, int], list[dict[str, float]]]


def curves(part: str) -> Curves:
    return {
        (name, micro_batches): run(name, STEPS, micro_batches=micro_batches)
        for micro_batches in (1, 2)
        for name in PARTS[part]
    }


@cache
def on_ranks(ranks: int, part: str) -> Curves:
    return run_ranks(ranks, curves, part, timeout=900)[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_ranks_and_accumulation_do_not_matter(part: str, name: str, ranks: int) -> None:
    reference = on_ranks(1, part)[name, 1]
    for micro_batches in (1,) if name in NORMALISED else (1, 2):
        found = on_ranks(ranks, part)[name, micro_batches]
        for step, (record, wanted) in enumerate(zip(found, reference, strict=True)):
            assert record == pytest.approx(wanted, rel=2e-4, abs=2e-6), (step, micro_batches)


@pytest.mark.parametrize(("part", "name"), CASES)
def test_every_part_of_it_does_something(part: str, name: str) -> None:
    curve = on_ranks(1, part)[name, 1][:-1]
    assert len({record["loss"] for record in curve}) == STEPS
    if not name.endswith("supervised"):
        assert any(record["unsupervised_loss"] != 0 for record in curve)
    rates = [record["mask_rate"] for record in curve if "mask_rate" in record]
    assert not rates or 0 < sum(rates) < len(rates), "the threshold must cut, else it is not tested"
