"""Every algorithm gives the same curve on 1, 2 and 4 ranks, with and without accumulation."""

from __future__ import annotations

import pytest

from hpdist.config import component_names
from tests.catalogue import NORMALISED, run
from tests.ranks import run_ranks

STEPS = 6
Curves = dict[tuple[str, int], list[dict[str, float]]]


def curves() -> Curves:
    return {
        (name, micro_batches): run(name, STEPS, micro_batches=micro_batches)
        for micro_batches in (1, 2)
        for name in component_names("algorithm")
    }


@pytest.fixture(scope="module")
def by_ranks() -> dict[int, Curves]:
    return {ranks: run_ranks(ranks, curves)[0] for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", component_names("algorithm"))
def test_ranks_and_accumulation_do_not_matter(
    by_ranks: dict[int, Curves], name: str, ranks: int
) -> None:
    reference = by_ranks[1][name, 1]
    for micro_batches in (1,) if name in NORMALISED else (1, 2):
        found = by_ranks[ranks][name, micro_batches]
        for step, (record, wanted) in enumerate(zip(found, reference, strict=True)):
            assert record == pytest.approx(wanted, rel=2e-4, abs=2e-6), (step, micro_batches)


@pytest.mark.parametrize("name", component_names("algorithm"))
def test_every_part_of_it_does_something(by_ranks: dict[int, Curves], name: str) -> None:
    curve = by_ranks[1][name, 1][:-1]
    assert len({record["loss"] for record in curve}) == STEPS
    if name != "supervised":
        assert any(record["unsupervised_loss"] != 0 for record in curve)
    rates = [record["mask_rate"] for record in curve if "mask_rate" in record]
    assert not rates or 0 < sum(rates) < len(rates), "the threshold must cut, else it is not tested"
