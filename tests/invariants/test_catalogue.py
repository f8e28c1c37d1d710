"""Every algorithm and add-on: the same steps on 1, 2 and 4 ranks, with and without accumulation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import lockstep
from tests.support.catalogue import CASES, NAMES, NORMALISED, build, make
from tests.support.lockstep import Recorded
from tests.support.ranks import run_ranks
from tests.support.sampling import selected

POINTS = (0, 1, 3, 5)
ON_ONE = {"comatch", "freematch", "mixmatch", "fixmatch reconstruction"}
"""Those that the default run tests on one rank, too."""
Found = dict[tuple[str, int], dict[int, list[str]]]  # what differs, by step


def record(names: Sequence[str], file: Path) -> dict[str, Recorded]:
    recorded = {
        name: lockstep.record(make(name, smooth=True), POINTS, build=partial(build, name))
        for name in names
    }
    torch.save(recorded, file)
    return recorded


def follow(file: Path, names: Collection[str]) -> Found:
    recorded = torch.load(file, weights_only=False)
    return {
        (name, micro_batches): lockstep.follow(
            make(name, smooth=True, micro_batches=micro_batches), run, build=partial(build, name)
        )
        for micro_batches in (1, 2)
        for name, run in recorded.items()
        if name in names and (micro_batches == 1 or name not in NORMALISED)
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded") / "runs.pt"


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest, file: Path) -> dict[str, Recorded]:
    names = [name for (name,) in selected(request, "name")]
    return run_ranks(1, record, names, file, timeout=900)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def by_ranks(
    request: pytest.FixtureRequest, file: Path, recorded: dict[str, Recorded]
) -> dict[int, list[Found]]:
    cases = selected(request, "ranks", "name")
    return {
        ranks: run_ranks(ranks, follow, file, {n for r, n in cases if r == ranks}, timeout=900)
        for ranks in {ranks for ranks, _ in cases}
    }


@pytest.mark.sampled(rows="name", columns="ranks", share=0.5)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_and_accumulation_do_not_matter(
    by_ranks: dict[int, list[Found]], name: str, ranks: int
) -> None:
    check(by_ranks[ranks], name)


@pytest.mark.parametrize("ranks", [1])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ON_ONE else pytest.mark.slow) for n in NAMES]
)
def test_accumulation_does_not_matter_on_one_rank(
    by_ranks: dict[int, list[Found]], name: str, ranks: int
) -> None:
    check(by_ranks[ranks], name)


def check(by_rank: list[Found], name: str) -> None:
    for found in by_rank:
        own = {key: told for key, told in found.items() if key[0] == name}
        assert own
        assert {key: told for key, told in own.items() if told} == {}


@pytest.mark.parametrize("name", CASES)
def test_every_part_of_it_does_something(recorded: dict[str, Recorded], name: str) -> None:
    run = recorded[name]
    assert len({record["loss"] for record in run.curve}) == len(run.curve)
    held = [step.metrics for step in run.firm.values()]
    if not name.endswith("supervised"):
        assert any(record["unsupervised_loss"] != 0 for record in held)
    rates = [record["mask_rate"] for record in held if "mask_rate" in record]
    assert not rates or 0 < sum(rates) < len(rates), "the threshold must cut, else it is not tested"
