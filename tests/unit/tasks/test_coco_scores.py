"""Average precision as COCO has it: small cases by hand, and the same on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hpdist.errors import ConfigError
from hpdist.tasks import coco_scores, make_task
from hpdist.tasks.coco_scores import CocoScores, average_precisions
from tests.support.ranks import run_ranks

NAMES = ("red", "white")


def rows(*found: tuple[float, ...]) -> Any:
    return np.array(found, np.float64).reshape(-1, 7)


def test_what_is_found_exactly_scores_one() -> None:
    true = rows((0, 0, 10, 10, 20, 20, 1), (1, 1, 0, 0, 100, 100, 1))
    scores = average_precisions(true, true, 3, NAMES)
    assert scores["map"] == scores["map_50"] == scores["map/red"] == scores["map_large"] == 1
    assert scores["map_small"] == 1
    assert "map_medium" not in scores  # there is none


def test_precision_is_interpolated_at_101_recalls_as_by_hand() -> None:
    """Found, not there, found: precision 1 up to recall 1/2, then 2/3 (51 and 50 of 101 recalls).

    The second box that is found covers 0.72 of its object: it counts at IoU 0.5 to 0.7 alone.
    """
    true = rows((0, 0, 0, 0, 10, 10, 1), (0, 0, 50, 50, 10, 10, 1))
    found = rows(
        (0, 0, 0, 0, 10, 10, 0.9), (0, 0, 80, 80, 10, 10, 0.8), (0, 0, 50, 50, 10, 7.2, 0.7)
    )
    scores = average_precisions(true, found, 1, NAMES)
    at_50, above = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores["map_50"] == pytest.approx(at_50)
    assert scores["map_75"] == pytest.approx(above)
    assert scores["map"] == pytest.approx((5 * at_50 + 5 * above) / 10)
    assert "map/white" not in scores  # no such box is there: it is left out of the mean, too


def test_nothing_found_and_nothing_there() -> None:
    true = rows((0, 0, 0, 0, 10, 10, 1))
    assert average_precisions(true, rows(), 2, NAMES)["map"] == 0
    assert math.isnan(average_precisions(rows(), true, 2, NAMES)["map"])


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_scores, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'hpdist\[detection\]'"):
        CocoScores(make_task("detection"), "cpu")  # type: ignore[arg-type]


def batches() -> Any:
    """Maps of 16 pictures that know of the boxes; scores are rounded, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    task = make_task("detection")
    labels = task.example_labels(16, 2, generator)
    outputs = {
        "heat": (torch.randn(16, 2, 4, 6, generator=generator) * 2).round(),
        "boxes": torch.randn(16, 4, 4, 6, generator=generator),
    }
    ends = torch.tensor([6, 4])
    for row, at in labels["there"].nonzero().tolist():
        box, number = labels["boxes"][row, at], int(labels["classes"][row, at])
        centre = (box[:2] + box[2:]) / 2 * ends
        x, y = (int(end) for end in centre)
        off = torch.randn(4, generator=generator) * 0.2
        sides = ((box[2:] - box[:2]) * ends).log()
        outputs["heat"][row, number, y, x] += 2
        outputs["boxes"][row, :, y, x] = off + torch.cat((centre - centre.floor() - 0.5, sides))
    keep = torch.arange(16) != 5
    return task, outputs, labels, keep


def part(rank: int, ranks: int) -> dict[str, float]:
    task, outputs, labels, keep = batches()
    meter = task.meter(outputs)
    own = slice(5, 16) if rank == 0 else slice(0, 5)  # neither as many on each, nor in order
    own = own if ranks > 1 else slice(0, 16)
    for half in np.array_split(np.arange(16)[own], 2):
        meter.add(
            {name: each[half] for name, each in outputs.items()},
            {name: each[half] for name, each in labels.items()},
            keep[half],
        )
    return meter.result().values


def part_of_two() -> dict[str, float]:
    torch.distributed.init_process_group("gloo")
    return part(torch.distributed.get_rank(), 2)


def test_two_ranks_have_the_scores_of_one() -> None:
    alone = part(0, 1)
    assert 0 < alone["map"] < 1
    for found in run_ranks(2, part_of_two):
        assert found == pytest.approx(alone, nan_ok=True, abs=1e-12)
