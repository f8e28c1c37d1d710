"""The algorithm of `docs/own-algorithm.md`, in a file of its own, trains as the catalogue's do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hpdist.algorithms import StudentOutputs, WeakOutputs
from hpdist.data.samples.digits import write_digits
from tests.support.documents import ROOT, files


def source() -> str:
    """The example, as it stands."""
    return files()["my_algorithms.py"]


def test_it_is_short() -> None:
    assert len(source().splitlines()) <= 40


def test_it_runs_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "my_algorithms.py").write_text(source())
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_digits(tmp_path / "demo/digits")
    name = "python:my_algorithms:MarginMatch"
    command = [sys.executable, "-m", "hpdist", "train", "configs/digits.yaml", "--algorithm.name"]
    command += [name, "--algorithm.momentum", "0.5", "--steps", "2", "--run.name", "own"]
    command += ["--model.width", "4", "--precision", "fp32", "--tracker.name", "none"]
    command += ["--log.every", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["unsupervised_loss"] for line in lines]
    assert len(losses) >= 2
    assert all(loss > 0 for loss in losses)


def test_its_threshold_is_the_average_margin() -> None:
    names: dict[str, type] = {}
    exec(compile(source(), "my_algorithms.py", "exec"), names)
    algorithm = names["MarginMatch"](momentum=0.5)
    logits = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]).log()
    weak = WeakOutputs(logits, torch.arange(3))
    rows = torch.tensor(3.0)
    algorithm.observe(algorithm.statistics(weak), rows)
    torch.testing.assert_close(algorithm.pending["margin"], torch.tensor((0.8 + 0.4 + 0.2) / 6))
    strong = torch.zeros(3, 2)
    outputs = StudentOutputs(strong, torch.zeros(3).long(), (strong,), weak, rows, rows)
    terms = algorithm.loss(outputs, {})  # the rows with margins 0.8 and 0.4 pass 0.2333
    torch.testing.assert_close(terms.unsupervised, torch.tensor(2.0).log() * 2 / 3)
