"""Predictions on several ranks: each row once, and the same bytes whoever was killed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch.distributed as dist

import hpdist
from tests.support.predictions import (
    ROWS,
    contents,
    kill_and_resume,
    kill_at_random,
    make_run,
    predict,
    unequal,
    vectors,
)
from tests.support.ranks import run_ranks


def test_killed_ranks_go_on_with_the_same_bytes(tmp_path: Path) -> None:
    (results,) = run_ranks(1, kill_and_resume, tmp_path, [4, 9, 20, 31, 40, 47, 13, 26])
    assert all(result["killed"] for result in results), results
    assert not unequal(results), unequal(results)
    assert {0} < {result["parts"] for result in results}  # some had written parts, and some none


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path: Path) -> None:
    (results,) = run_ranks(1, kill_at_random, tmp_path, 10)
    assert len(results) == 10, results
    assert not unequal(results), unequal(results)
    assert {result["ranks"] for result in results} == {1, 3}
    ids = pq.read_table(tmp_path / "whole").column("id").to_pylist()
    assert sorted(ids) == list(range(ROWS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    make_run(folder)
    return folder


def test_each_row_once_with_its_place_and_what_the_model_gives(trained: Path) -> None:
    found = predict(trained, "labels")
    assert found is not None
    assert (found.rows, found.written, found.bad) == (ROWS, ROWS, 0)
    table = pq.read_table(trained / "labels").sort_by("id")
    assert table.column("id").to_pylist() == list(range(ROWS))
    rows = table.to_pylist()
    assert (rows[40]["row_group"], rows[40]["row"]) == (1, 0)
    assert rows[40]["file"].endswith("train-00001.parquet")
    predictor = hpdist.load(trained / "run")
    x = vectors()
    expected = predictor.predict_probabilities(x)
    np.testing.assert_allclose(table.column("probabilities").to_pylist(), expected, atol=1e-6)
    assert table.column("label").to_pylist() == predictor.predict(x)
    np.testing.assert_allclose(table.column("confidence"), expected.max(axis=1), atol=1e-6)
    assert len(set(table.column("label").to_pylist())) > 1


def test_ranks_do_not_matter(trained: Path) -> None:
    predict(trained, "alone")
    run_ranks(3, predict, trained, "together")
    assert contents(trained / "alone") == contents(trained / "together")
    assert len(contents(trained / "alone")) == 12  # eleven parts and their record


def crossing(folder: Path) -> list[bytes]:
    """Predict; everything that this rank has given to the process group."""
    given: list[bytes] = []
    gather, broadcast = dist.all_gather_object, dist.broadcast_object_list
    reduce = dist.all_reduce

    def all_gather_object(everyone: list[Any], value: Any, *rest: Any) -> None:
        given.append(pickle.dumps(value))
        gather(everyone, value, *rest)

    def broadcast_object_list(values: list[Any], *rest: Any, **named: Any) -> None:
        given.append(pickle.dumps(values))
        broadcast(values, *rest, **named)

    def all_reduce(numbers: Any, *rest: Any) -> None:
        assert numbers.numel() == 1, "a flag, or a count"
        given.append(pickle.dumps(numbers.tolist()))
        reduce(numbers, *rest)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("another collective")

    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = broadcast_object_list
    dist.all_reduce = all_reduce
    for name in ("all_gather", "broadcast", "gather", "scatter", "send", "isend"):
        setattr(dist, name, refused)
    predict(folder, "crossing")
    return given


def test_no_row_leaves_the_rank_that_read_it(trained: Path) -> None:
    given = [part for rank in run_ranks(2, crossing, trained) for part in rank]
    assert 0 < sum(len(part) for part in given) < 2000
    rows = [row.tobytes() for row in vectors()]
    assert not any(row in part for row in rows for part in given)


def test_the_command_under_a_launcher(trained: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    command = [
        *(sys.executable, "-m", "hpdist", "predict", str(trained / "run"), str(trained / "data")),
        *("--out", str(trained / "command"), "--rows-per-file", "50", "--columns", "label_copy"),
    ]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "label_copy" in wrong.stderr
    command[-2:] = ["--threshold", "0.7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("predictions:") == 1
    table = pq.read_table(trained / "command")
    assert 0 < table.num_rows < ROWS
    assert min(table.column("confidence").to_pylist()) >= 0.7
