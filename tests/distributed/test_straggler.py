"""A record names the rank that the others wait for, whatever makes it slow."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpdist.distributed.stragglers import RankTimer, stragglers
from tests.support.parquet_files import write_numbers
from tests.support.ranks import run_ranks
from tests.support.run_records import read

SLOW = 0.12  # seconds of a step more than the other rank: far more than a step of both takes


class Sleepy(nn.Module):
    """Takes its time on the second rank."""

    def __init__(self, seconds: float, norm: bool) -> None:
        super().__init__()
        self.seconds = seconds if os.environ["RANK"] == "1" else 0.0
        layers = [nn.Linear(2, 8), nn.BatchNorm1d(8)] if norm else [nn.Linear(2, 8)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.layers(inputs)


ROWS = """
import os, time

def slowly(row):
    time.sleep(SECONDS if os.environ["RANK"] == "1" else 0)
    return row
"""


def train(folder: Path, files: list[str], seconds: float, norm: bool) -> None:
    from hpdist.train.trainer import Trainer

    sys.path.insert(0, str(folder))
    data = {"path": "parquet", "data_files": files, "input": "x"}
    Trainer(
        Sleepy(seconds, norm),
        {"name": "fixmatch", "threshold": 0.2},
        labeled=data | {"rows": 24},
        unlabeled=data | {"streaming": True, "map": "python:slowly:slowly"},
        views={"name": "identity"},
        batch={"labeled": 4, "unlabeled": 8},
        steps=16,
        log={"every": 8},
        tracker={"name": "none"},
        run={"dir": str(folder), "name": "run"},
    ).fit()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("model_seconds", "row_seconds", "norm"),
    [(SLOW / 2, 0.0, False), (0.0, SLOW / 4, False), (0.0, SLOW / 4, True)],
    ids=["model", "rows", "rows, with forwards that wait for one another"],
)
def test_the_slow_rank_is_named(tmp_path, model_seconds, row_seconds, norm):
    """The model is called for the weak and for the student's pass; a rank has four rows a step."""
    files = [str(path) for path in write_numbers(tmp_path / "data", [[300], [300]])]
    (tmp_path / "slowly.py").write_text(ROWS.replace("SECONDS", str(row_seconds)))
    run_ranks(2, train, tmp_path, files, model_seconds, norm)
    found = read(tmp_path / "run")
    assert [record["step"] for record in found] == [8, 16]
    for record in found:
        assert record["slowest_rank"] == 1
        fast, slow = record["examples_per_second_per_rank"]
        assert 2 * slow < fast
        assert 0.2 < record["slowest_rank_lag"] < 1
    if row_seconds:  # the rank that waits is not the one that writes the record
        assert found[1]["data_wait"] > 0.2


def test_the_slowest_is_held_against_the_others_median():
    found = stragglers([0.1, 0.5, 0.2, 0.1], rows=40, step_seconds=0.8)
    assert found["slowest_rank"] == 1
    assert found["slowest_rank_lag"] == pytest.approx(0.5)
    assert found["examples_per_second_per_rank"] == [100.0, 20.0, 50.0, 100.0]
    assert stragglers([0.1], rows=40, step_seconds=0.8) == {}


def test_a_record_does_not_grow_with_very_many_ranks():
    seconds = [0.1 + rank / 10_000 for rank in range(1023)] + [0.01]
    found = stragglers(seconds, rows=10_240, step_seconds=0.8)
    assert found["slowest_rank"] == 1022
    speeds = {key: value for key, value in found.items() if "per_second" in key}
    assert speeds == {
        "examples_per_second_per_rank_min": 49.5,  # 10 rows in 0.2022 s
        "examples_per_second_per_rank_median": pytest.approx(66.2, abs=0.1),
        "examples_per_second_per_rank_max": 1000.0,
    }
    assert len(str(found)) < 300
    listed = stragglers(seconds[:64], rows=640, step_seconds=0.8)
    assert len(listed["examples_per_second_per_rank"]) == 64


@pytest.mark.alone
def test_time_is_a_step_s_own_and_is_taken_once():
    own = RankTimer(torch.device("cpu"))
    for _ in range(2):
        own.begin()
        time.sleep(0.01)
        own.begin()  # the step begins; the reading of its rows had begun before
        time.sleep(0.01)
        own.end()
        own.end()
        time.sleep(0.05)  # waiting for the others
    assert 0.02 <= own.take() < 0.05
    assert own.take() == 0.0


@pytest.mark.alone
def test_what_is_done_ahead_counts_for_the_next_step():
    own = RankTimer(torch.device("cpu"))
    with own.ahead():
        time.sleep(0.02)
    time.sleep(0.05)  # waiting for the others
    own.begin()
    time.sleep(0.01)
    own.end()
    assert 0.03 <= own.take() < 0.06
