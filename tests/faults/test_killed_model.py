"""SIGKILL while a run writes `model/`: it is the earlier one, the new one or none, and whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hpdist
from tests.support.fault_table import Fault
from tests.support.parquet_files import write_numbers

KILLS = 10
EARLIER, LAST = 3, 6  # the steps of the model that is there, and of the one that is being written
ROOT = Path(__file__).parents[2]
CONFIG = """
model: {name: mlp, hidden: [1024, 512]}
data:
  labeled: {path: parquet, data_files: DATA, input: x, rows: 24}
  unlabeled: {path: parquet, data_files: DATA, input: x, streaming: true}
views: {name: identity}
batch: {labeled: 12, unlabeled: 24}
algorithm: {name: fixmatch, threshold: 0.2}
optim: {lr: 0.0001}
checkpoint: {every: 3}
tracker: {name: none}
precision: fp32
"""


class Runs:
    """A config, and the commands that train it, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [str(path) for path in write_numbers(folder / "data", [[17, 9], [14, 31]])]
        (folder / "config.yaml").write_text(CONFIG.replace("DATA", json.dumps(files)))

    def start(self, name: str, steps: int) -> subprocess.Popen[bytes]:
        """Train so many steps by command, or go on."""
        command = [sys.executable, "-m", "hpdist", "train", str(self.folder / "config.yaml")]
        command += [
            "--steps",
            str(steps),
            "--run.dir",
            str(self.folder / name),
            "--run.name",
            "run",
        ]
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=(self.folder / "output").open("a"),
            stderr=subprocess.STDOUT,
        )

    def train(self, name: str, steps: int) -> Path:
        """Train to the end; the run's folder."""
        assert self.start(name, steps).wait(240) == 0, (self.folder / "output").read_text()[-5000:]
        return self.folder / name / "run"

    def copy(self, name: str, other: str, *, model: bool = True) -> Path:
        """Copy a run, with or without its `model/`; the folder of the copy."""
        shutil.copytree(self.folder / name, self.folder / other, symlinks=True)
        if not model:
            shutil.rmtree(self.folder / other / "run" / "model")
        return self.folder / other / "run"


def seconds_of_writing(process: subprocess.Popen[bytes], run: Path, delay: float = 60) -> float:
    """Wait until `model/` is being written, for so long or until it is over; the seconds of it."""
    began = None
    while process.poll() is None:
        writing = any(run.glob(".model-writing-*"))
        if began is None:
            began = time.monotonic() if writing else None
        elif not writing or time.monotonic() - began >= delay:
            return time.monotonic() - began
    return 0.0 if began is None else time.monotonic() - began


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_model(run: Path, known: dict[int, Path], *, had_one: bool) -> None:
    """Load what a killed run has: the model of one of the known steps, whole."""
    if not (run / "model").exists():
        assert not had_one, "the earlier model is gone"
    else:
        assert (run / "model" / "hpdist.json").is_file()
    loaded = hpdist.load(run)  # it verifies the files; of the newest checkpoint without model/
    assert loaded.step is not None
    expected = hpdist.load(known[loaded.step] / "model")
    assert loaded.model is not None
    assert expected.model is not None
    weights = dict(expected.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.slow
def test_killed_while_the_model_is_written(tmp_path: Path, inject: Callable[..., Fault]) -> None:
    fault = inject("a run killed while it writes model/", KILLS)
    runs = Runs(tmp_path)
    runs.train("earlier", EARLIER)
    whole = runs.copy("earlier", "whole")
    process = runs.start("whole", LAST)
    whole_write = seconds_of_writing(process, whole)
    assert process.wait(240) == 0
    assert whole_write > 0
    known = {EARLIER: tmp_path / "earlier" / "run", LAST: whole}
    inside = 0
    for number in range(KILLS):
        name, had_one = f"killed-{number}", number % 2 == 0
        run = runs.copy("earlier", name, model=had_one)
        process = runs.start(name, LAST)
        seconds_of_writing(process, run, delay=number * whole_write / KILLS)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        inside += any(run.glob(".model-writing-*"))
        check_model(run, known, had_one=had_one)
        runs.train(name, LAST)
        assert files_of(run / "model") == files_of(whole / "model")
        assert not list(run.glob(".model-*"))
        shutil.rmtree(tmp_path / name)
    assert inside >= KILLS // 2, "too few kills came while it was being written"
    fault.survived()
