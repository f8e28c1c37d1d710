"""The same state gives the same step on 1, 2 and 4 ranks, with and without accumulation.

All along a curve, whose first state is the seed's: so the same seed gives the same curve.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.algorithms import Algorithm, FixMatch, FreeMatch, Supervised
from tests.support import lockstep
from tests.support.lockstep import Recorded
from tests.support.ranks import run_ranks
from tests.support.recipes import make_step

POINTS = (0, 1, 4, 9)
ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "supervised": Supervised,
    "fixmatch": lambda: FixMatch(0.15),
    "freematch": lambda: FreeMatch(10, momentum=0.3, fairness_weight=0.05),
}
# (norm, micro-batches): a BatchNorm sees one micro-batch at a time, so it is not cut
SHAPES = [("group", 1), ("group", 2), ("batch", 1)]
Runs = dict[tuple[str, str], Recorded]
Found = dict[tuple[str, str, int], dict[int, list[str]]]  # what differs, by step


def record_and_follow(file: Path) -> tuple[Runs, Found]:
    found: Runs = {}
    accelerator: Any = None
    for algorithm in ALGORITHMS:
        for norm in ("group", "batch"):
            step = make_step(
                ALGORITHMS[algorithm](), norm=norm, smooth=True, accelerator=accelerator
            )
            accelerator = step.engine.accelerator
            found[algorithm, norm] = lockstep.record(step, POINTS)
    torch.save(found, file)
    return found, follow(file)


def follow(file: Path) -> Found:
    recorded = torch.load(file, weights_only=False)
    found: Found = {}
    accelerator: Any = None
    for algorithm in ALGORITHMS:
        for norm, micro_batches in SHAPES:
            step = make_step(
                ALGORITHMS[algorithm](),
                norm=norm,
                smooth=True,
                micro_batches=micro_batches,
                accelerator=accelerator,
            )
            accelerator = step.engine.accelerator
            found[algorithm, norm, micro_batches] = lockstep.follow(step, recorded[algorithm, norm])
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded") / "runs.pt"


@pytest.fixture(scope="module")
def on_one(file: Path) -> tuple[Runs, Found]:
    return run_ranks(1, record_and_follow, file)[0]


@pytest.fixture(scope="module")
def by_ranks(file: Path, on_one: tuple[Runs, Found]) -> dict[int, list[Found]]:
    return {1: [on_one[1]], **{ranks: run_ranks(ranks, follow, file) for ranks in (2, 4)}}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_ranks_and_accumulation_do_not_matter(
    by_ranks: dict[int, list[Found]], ranks: int, algorithm: str, shape: tuple[str, int]
) -> None:
    for found in by_ranks[ranks]:
        assert found[(algorithm, *shape)] == {}


def test_the_curves_are_no_trivial_ones(on_one: tuple[Runs, Found]) -> None:
    for (algorithm, _), run in on_one[0].items():
        assert len({record["loss"] for record in run.curve}) == POINTS[-1] + 1
        rates = [step.metrics.get("mask_rate", 0.5) for step in run.firm.values()]
        assert any(0 < rate < 1 for rate in rates), "the threshold must cut, else it is not tested"
        if algorithm == "freematch":
            assert any(step.metrics["fairness_loss"] != 0 for step in run.firm.values())
