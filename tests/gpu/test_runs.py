"""Whole runs on the GPU: killed and continued; then predicted with, evaluated and exported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from hpdist.data.samples.digits import TEST_ROWS, write_digits
from tests.gpu.device import is_dry_run
from tests.support.slow_run import SlowRun

ROOT = Path(__file__).parents[2]
STEPS = 12
LEARNT = 0.05 if is_dry_run() else 0.6
"""The least accuracy on the digits; a guess has 0.1, and a dry run learns nothing."""
TINY = ["--model.width", 8, "--batch.labeled", 10, "--batch.unlabeled", 10]


def hpdist(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpdist", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_killed_run_continues_and_uses_each_row_once(
    precision: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    slow = SlowRun(tmp_path, [[40, 33], [51]])
    command = [sys.executable, "-m", "hpdist", "train", str(tmp_path / "config.yaml")]
    command += ["--steps", str(STEPS), "--precision", precision]
    command += ["--run.dir", str(tmp_path), "--run.name", "run"]
    with (tmp_path / "output").open("a") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, text=True)
        slow.await_step(process, 5)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert not (slow.run / "summary.json").exists()
        done = subprocess.run(command, cwd=tmp_path, stdout=output, stderr=output, timeout=240)
    assert done.returncode == 0, slow.output[-4000:]
    assert [record["step"] for record in slow.records()] == list(range(1, STEPS + 1))
    summary = json.loads((slow.run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    cost = slow.cost(STEPS + summary["skipped_steps"])  # the first loss scale may be too large
    assert (cost["rows_lost"], cost["rows_repeated"]) == (0, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/digits`, in bf16 on the device."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "demo" / "digits")
    steps = 10 if is_dry_run() else 200
    options = ["--steps", steps, "--eval.every", steps, "--precision", "bf16"]
    options += TINY if is_dry_run() else []
    hpdist("train", ROOT / "configs/digits.yaml", *options, "--tracker.name", "none", cwd=folder)
    return folder


def test_the_model_is_measured_in_every_precision(trained: Path, device: torch.device) -> None:
    hpdist("evaluate", "runs/digits", "--precision", "fp32,bf16,fp16", cwd=trained)
    found = json.loads((trained / "runs/digits/evaluation.json").read_text())
    text = json.dumps(found)
    assert all(precision in text for precision in ("fp32", "bf16", "fp16"))
    summary = json.loads((trained / "runs/digits/summary.json").read_text())
    assert summary["test/accuracy"] > LEARNT


def test_each_row_is_predicted_once(trained: Path, device: torch.device) -> None:
    data = trained / "demo/digits/test-00000-of-00001.parquet"
    hpdist("predict", "runs/digits", data, "--out", "labels", "--probabilities", cwd=trained)
    table = pq.read_table(trained / "labels")
    assert sorted(table.column("id").to_pylist()) == list(range(TEST_ROWS))
    sums = [sum(row) for row in table.column("probabilities").to_pylist()]
    assert max(abs(total - 1) for total in sums) < 1e-3
    assert len(set(table.column("label").to_pylist())) > 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_model_is_exported_and_checked(
    trained: Path, precision: str, device: torch.device
) -> None:
    """`export` itself compares the file's outputs with the model's, and refuses a difference."""
    file = trained / f"{precision}.onnx"
    hpdist("export", "runs/digits", "--out", file, "--precision", precision, cwd=trained)
    assert file.stat().st_size > 10_000
