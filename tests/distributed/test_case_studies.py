"""The case studies' configs train, and what their tables say is computed as they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hpdist.data.samples.synthetic import write_classification, write_clusters
from tests.benchmarks import case_studies
from tests.support.ranks import run_ranks


def test_the_rows_are_as_described_and_the_same_every_time(tmp_path: Path) -> None:
    for write, columns in ((write_clusters, ["x"]), (write_classification, ["x0", "x9"])):
        first, again = write(tmp_path / "first"), write(tmp_path / "again")
        for name, rows in (("labeled", 500), ("unlabeled", 500), ("test", 1000)):
            table = pq.read_table(first / f"{name}.parquet")
            assert table.equals(pq.read_table(again / f"{name}.parquet"))
            assert len(table) == rows
            assert set(columns) <= set(table.column_names)
            assert ("label" in table.column_names) == (name != "unlabeled")
            if name != "unlabeled":
                assert 0.4 * rows < sum(table.column("label").to_pylist()) < 0.6 * rows
    assert len(pq.read_table(write_clusters(tmp_path / "x") / "test.parquet").column("x")[0]) == 784


@pytest.mark.slow
def test_one_row_of_each_per_step_in_half_precision(tmp_path: Path) -> None:
    run_ranks(1, case_studies.train_synthetic, tmp_path, "run", "--steps=12")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["precision"], summary["examples"], summary["steps"]) == ("bf16", 24, 12)
    text = "\n".join(case_studies.synthetic_table(tmp_path / "run"))
    assert re.search(r"^\| 1 \| \d+ ", text, re.MULTILINE)
    assert "| 100 | never | never" in text


def test_half_precision_weights_say_what_fp32_ones_do(tmp_path: Path) -> None:
    more = ("--steps=60", "--eval.every=60")
    (found,) = run_ranks(1, case_studies.train_classification, tmp_path, "run", *more)
    assert found["fp32"].agreement == 1
    assert found["fp32"].apart == 0
    for name, apart in (("fp16", 5e-3), ("bf16", 5e-2)):
        assert found[name].accuracy == pytest.approx(found["fp32"].accuracy, abs=0.02)
        assert found[name].agreement > 0.98
        assert 0 < found[name].apart < apart
        assert found[name].bytes * 2 == found["fp32"].bytes
    assert found["fp32"].accuracy > 0.8


@pytest.mark.slow
def test_the_commands_train_evaluate_convert_and_compare(tmp_path: Path) -> None:
    """The sequence of docs/half-precision.md, with fewer steps."""

    def hpdist(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        environment = os.environ | {"PYTHONPATH": str(case_studies.CONFIGS.parent)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = str(case_studies.CONFIGS / "case_classification.yaml")
    hpdist("hpdist.data.samples.synthetic", "demo/tables")
    hpdist("hpdist", "train", config, "--steps=100", "--tracker.name=none")
    run = tmp_path / "runs/case_classification"
    summary = json.loads((run / "summary.json").read_text())

    hpdist("hpdist", "evaluate", str(run), "--precision", "fp32")
    first = json.loads((run / "evaluation.json").read_text())["results"]
    assert list(first) == ["fp32"]
    text = hpdist("hpdist", "evaluate", str(run), "--precision", "fp32,fp16,bf16")
    again = json.loads((run / "evaluation.json").read_text())["results"]
    assert [name for name in again if re.search(f"^{name} ", text, re.MULTILINE)] == list(again)

    full = again["fp32"]
    assert full["scores"] == first["fp32"]["scores"]
    assert full["scores"]["accuracy"] == pytest.approx(summary["test/accuracy"], abs=1e-9)
    assert full["scores"]["accuracy"] > 0.8
    assert full["bytes"] == 4 * (11 * 500 + 501 * 2)  # one hidden layer of 500
    for name, difference in (("fp16", 5e-2), ("bf16", 0.5)):
        half = again[name]
        assert half["scores"]["accuracy"] == pytest.approx(full["scores"]["accuracy"], abs=0.02)
        assert half["agreement"] > 0.98
        assert 0 < half["largest_difference"] < difference
        assert 2 * half["bytes"] == full["bytes"]


def test_a_window_is_the_mean_of_the_last_steps() -> None:
    losses = [1.0, 0.2, 0.9, 0.3, 0.3, 0.1]
    below = [case_studies.first_below(losses, window, 0.35) for window in (1, 2, 3, 6, 7)]
    assert below == [2, 5, 6, None, None]
    assert case_studies.first_below([0.4], 1, 0.35) is None
