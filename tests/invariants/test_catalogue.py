"""Every algorithm and add-on: the same steps on 1, 2 and 4 ranks, with and without accumulation."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support import lockstep
from tests.support.catalogue import CASES, NORMALISED, PARTS, make
from tests.support.lockstep import Recorded
from tests.support.ranks import run_ranks

POINTS = (0, 1, 3, 5)
Found = dict[tuple[str, int], dict[int, list[str]]]  # what differs, by step


def follow(file: Path) -> Found:
    recorded = torch.load(file, weights_only=False)
    return {
        (name, micro_batches): lockstep.follow(
            make(name, smooth=True, micro_batches=micro_batches), run
        )
        for micro_batches in (1, 2)
        for name, run in recorded.items()
        if micro_batches == 1 or name not in NORMALISED
    }


def record_and_follow(part: str, file: Path) -> tuple[dict[str, Recorded], Found]:
    recorded = {name: lockstep.record(make(name, smooth=True), POINTS) for name in PARTS[part]}
    torch.save(recorded, file)
    return recorded, follow(file)


@cache
def on_one(part: str) -> tuple[dict[str, Recorded], Found]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(1, record_and_follow, part, Path(folder, "runs.pt"), timeout=900)[0]


@cache
def on_ranks(ranks: int, part: str) -> list[Found]:
    recorded, found = on_one(part)
    if ranks == 1:
        return [found]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "runs.pt")
        torch.save(recorded, file)
        return run_ranks(ranks, follow, file, timeout=900)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_ranks_and_accumulation_do_not_matter(part: str, name: str, ranks: int) -> None:
    for found in on_ranks(ranks, part):
        assert {key: told for key, told in found.items() if key[0] == name and told} == {}


@pytest.mark.parametrize(("part", "name"), CASES)
def test_every_part_of_it_does_something(part: str, name: str) -> None:
    run = on_one(part)[0][name]
    assert len({record["loss"] for record in run.curve}) == len(run.curve)
    held = [step.metrics for step in run.firm.values()]
    if not name.endswith("supervised"):
        assert any(record["unsupervised_loss"] != 0 for record in held)
    rates = [record["mask_rate"] for record in held if "mask_rate" in record]
    assert not rates or 0 < sum(rates) < len(rates), "the threshold must cut, else it is not tested"
