"""The input kind of `docs/own-input-kind.md`, one file, trains as those that come with hpdist do.

Its rows are tensors by name: on any number of ranks, streamed, decoded in processes and resumed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpdist.errors import ConfigError
from tests.support.documents import files
from tests.support.ranks import run_ranks
from tests.support.signals import write_signals

ALGORITHMS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "fixmatch": {"threshold": 0.6},
    "mean_teacher": {"unsupervised_weight": 1.0, "ramp": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, the kind's file and the config, as the page has them."""
    folder = tmp_path_factory.mktemp("own")
    write_signals(folder / "signals")
    for name in ("series.py", "signals.yaml"):
        (folder / name).write_text(files()[name], encoding="utf-8")
    return folder


def train(
    folder: str, runs: str, name: str, steps: int, algorithm: str, **settings: Any
) -> tuple[list[float], dict[str, Any]]:
    """Train on this rank; gives the losses of all steps, and the summary."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from hpdist.train.trainer import Trainer

    config = yaml.safe_load((Path(folder) / "signals.yaml").read_text())
    for source in config["data"].values():
        source["path"] = str(Path(folder, source["path"]))
    config["data"] |= settings.pop("data", {})
    config |= {"algorithm": {"name": algorithm, **ALGORITHMS.get(algorithm, {})}, "steps": steps}
    config |= {"run": {"dir": runs, "name": name}, "log": {"every": 1}, "checkpoint": {"every": 2}}
    made = Trainer.from_settings(config | settings)
    summary = made.fit()
    return curve(Path(runs, name)), summary


def curve(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_runs_are_equal_on_any_ranks_and_when_they_go_on(
    folder: Path, tmp_path: Path, algorithm: str
) -> None:
    def ran(ranks: int, name: str, steps: int, **more: Any) -> list[float]:
        runs = str(tmp_path)
        return run_ranks(ranks, _train, str(folder), runs, name, steps, algorithm, more)[0][0]

    one, two = ran(1, "one", 6), ran(2, "two", 6)
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    decoded = ran(1, "processes", 6, data={"loading": {"processes": 2, "threads": 2}})
    assert decoded == one
    ran(1, "again", 3)
    assert ran(2, "again", 6) == pytest.approx(one, rel=1e-5, abs=1e-6)
    kept = json.loads((tmp_path / "again" / "inputs.json").read_text())
    assert kept == {"length": 11}


def _train(
    folder: str, runs: str, name: str, steps: int, algorithm: str, more: dict[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    return train(folder, runs, name, steps, algorithm, **more)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    whole = run_ranks(1, _train, str(folder), str(tmp_path), "whole", 40, "fixmatch", {})[0][0]
    command = [sys.executable, "-m", "hpdist", "train", "signals.yaml", "--steps", "40"]
    command += ["--run.dir", str(tmp_path), "--run.name", "killed", "--log.every", "1"]
    command += ["--checkpoint.every", "2", "--algorithm.threshold", "0.6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = tmp_path / "killed"
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None and not list(run.glob("checkpoints/*4")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(curve(run)) < 40
    subprocess.run(command, cwd=folder, env=environment, check=True)
    assert curve(run) == whole


def test_what_its_rows_do_not_allow_is_said(folder: Path, tmp_path: Path) -> None:
    arguments = str(folder), str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"MixMatch mixes inputs, .* series of numbers, which are"
    ):
        train(*arguments, "mixed", 1, "mixmatch")
    with pytest.raises(ConfigError, match=r"mlp takes one tensor, .* by name, values, there; use"):
        train(*arguments, "mlp", 1, "supervised", model="mlp")
    with pytest.raises(ConfigError, match=r"no kind of input is called 'serie'; known: "):
        train(
            *arguments, "none", 1, "supervised", views={"name": "identity", "input_kind": "serie"}
        )
    views = {"name": "identity", "input_kind": "text"}
    with pytest.raises(ConfigError, match=r"input_kind: text: .* set views\.name: text"):
        train(*arguments, "text", 1, "supervised", views=views)


def test_what_goes_wrong_in_it_is_said_on_every_rank(folder: Path, tmp_path: Path) -> None:
    """And no rank waits for one that has failed."""
    broken = (folder / "series.py").read_text().replace("rows.read(np.arange(len(rows)))", "()")
    assert "in ()" in broken
    (folder / "broken.py").write_text(broken.replace('"series"', '"broken"'))
    views = {"name": "identity", "input_kind": "python:broken:Series"}
    said = run_ranks(2, _refused, str(folder), str(tmp_path), views)
    assert said[0] == said[1]
    assert "the input kind broken failed: ValueError: max()" in said[0]


def _refused(folder: str, runs: str, views: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        train(folder, runs, "broken", 1, "supervised", views=views)
    return str(refused.value)


def test_examples_and_bad_rows_are_named(folder: Path, tmp_path: Path) -> None:
    train(str(folder), str(tmp_path), "shown", 1, "fixmatch")
    lines = (tmp_path / "shown" / "examples" / "views.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [
        ["original", "values"],
        ["original", "there"],
    ]
    spec = import_module("series").SeriesSpec(4)
    rows = spec.empty(3)
    reasons = spec.decode_valid([None, import_module("numpy").ones(2), "x"], rows)
    assert list(reasons) == [0, 2]
    assert rows["there"].tolist() == [[False] * 4, [True, True, False, False], [False] * 4]
