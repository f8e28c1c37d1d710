"""8, 16 and 32 processes of a tiny run: what a rank sends and opens does not grow with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hpdist
from tests.support.crossing import Crossing
from tests.support.parquet_files import write_numbers
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow  # 56 processes

RANKS = (8, 16, 32)
LABELED, UNLABELED, STEPS = 32, 96, 4


class Small(nn.Module):
    """With batch normalisation, so that each pass has a collective of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs / 50)
        return logits


def train(folder: Path, steps: int) -> hpdist.Trainer:
    files = {"path": "parquet", "data_files": str(folder / "data" / "*.parquet"), "input": "x"}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return hpdist.Trainer(
        Small(),
        {"name": "freematch"},
        labeled={**files, "rows": 48},
        unlabeled={**files, "streaming": True},
        views={"name": "identity"},
        batch={"labeled": LABELED, "unlabeled": UNLABELED},
        run={"dir": str(folder), "name": f"of-{ranks}"},
        schedule={"name": "constant"},
        zero={"stage": 2},
        log={"every": 1},
        checkpoint={"every": 2},
        tracker={"name": "none"},
        steps=steps,
    )


def on_rank(folder: Path) -> dict[str, Any]:
    """Train, and resume: what this rank gave to collectives, and which files it opened."""
    dist.init_process_group("gloo")
    opened: list[str] = []
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" else None  # type: ignore[func-returns-value]
    )
    found: dict[str, Any] = {}
    with Crossing(Small) as crossing:
        training = train(folder, STEPS)
        found["calls at the start"] = len(crossing.given)
        found["bytes at the start"] = sum(crossing.sizes().values())
        before = len(crossing.given)
        training.fit()
        given = crossing.given[before:]
        found["calls"] = len(given)
        found["bytes"] = sum(len(raw) for _, raw in given)
        found["steps"] = training.step.applied_steps
    opened.clear()
    resumed = train(folder, STEPS + 1)
    resumed.fit()
    ours = {name for name in opened if f"/checkpoints/step-{STEPS:08}/" in name}
    found["files"] = sorted(Path(name).name for name in ours)
    return found


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("many")
    write_numbers(folder / "data", [[48] * 4])
    return {ranks: run_ranks(ranks, on_rank, folder, timeout=900) for ranks in RANKS}


def test_a_rank_calls_and_sends_as_much_whatever_their_number(
    by_ranks: dict[int, list[dict[str, Any]]],
) -> None:
    """But for the three numbers of each rank that a logged step adds up: up to 64 ranks."""
    few = by_ranks[RANKS[0]]
    assert {one["steps"] for found in by_ranks.values() for one in found} == {STEPS}
    for ranks, found in by_ranks.items():
        of_ranks = 3 * 4 * STEPS * (ranks - RANKS[0])
        for place in (0, 1):  # rank 0 has a part of its own
            others = found[place:] if place else found[:1]
            for key in ("calls", "calls at the start", "bytes at the start"):
                assert {one[key] for one in others} == {few[place][key]}, key
            sent = {one["bytes"] for one in others}
            assert len(sent) == 1
            assert few[place]["bytes"] <= sent.pop() <= few[place]["bytes"] + of_ranks


def test_a_rank_opens_its_own_file_of_a_checkpoint(
    by_ranks: dict[int, list[dict[str, Any]]],
) -> None:
    for found in by_ranks.values():
        for rank, one in enumerate(found[1:], start=1):
            assert one["files"] == ["manifest.json", f"rank-{rank:05}.safetensors"]
