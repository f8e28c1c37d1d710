"""The task of `docs/own-task.md`, one file, by config and command: on any ranks, and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from datasets import List, Value

from hpdist import cli
from tests.support.documents import files
from tests.support.ranks import run_ranks

ROWS = {"labeled": 16, "unlabeled": 46, "test": 21, "validation": 13}
GRADES = (1, 2, 4, 8)
ALGORITHMS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "fixmatch": {"threshold": 0.55},
    "mean_teacher": {"unsupervised_weight": 1.0, "ramp": 0.0},
}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole numbers in order, a config of each algorithm, and the task's one file."""
    place = tmp_path_factory.mktemp("own_task")
    (place / "toy_ordinal.py").write_text(files()["toy_ordinal.py"])
    for number, (name, count) in enumerate(ROWS.items()):
        rows = np.random.default_rng(number).normal(size=(count, 6)).astype(np.float32)
        features = {"x": List(Value("float32"), length=6)}
        columns: dict[str, Any] = {"x": rows.tolist()}
        if name != "unlabeled":
            ranks = np.digitize(rows[:, 0], [-0.7, 0.0, 0.7])
            ranks[:4] = range(4)
            columns["grade"], features["grade"] = np.array(GRADES)[ranks], Value("int64")
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(place / f"{name}.parquet"))
    for algorithm, options in ALGORITHMS.items():
        text = yaml.safe_dump(settings(place, algorithm, options))
        (place / f"{algorithm}.yaml").write_text(text)
    return place


def settings(place: Path, algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, dict[str, Any]] = {
        part: {"path": "parquet", "data_files": str(place / f"{part}.parquet"), "input": "x"}
        for part in ROWS
    }
    for part in ("labeled", "test", "validation"):
        data[part]["label"] = "grade"
    data["unlabeled"]["streaming"] = True
    return {
        "model": {"name": "mlp", "hidden": [16]},
        "task": {"name": "python:toy_ordinal:OrdinalConfig", "cutoff": 0.45},
        "data": data,
        "views": {"name": "table"},
        "batch": {"labeled": 4, "unlabeled": 20},
        "algorithm": {"name": algorithm, **options},
        "schedule": {"name": "constant"},
        "steps": STEPS,
        "eval": {"every": 3},
        "log": {"every": 1, "examples": 0},
        "checkpoint": {"every": 2},
        "tracker": {"name": "none"},
        "run": {"dir": str(place / "runs")},
    }


def train(place: Path, algorithm: str, name: str, steps: int) -> int:
    os.chdir(place)
    arguments = ["train", f"{algorithm}.yaml", "--run.name", name, "--steps", str(steps)]
    return cli.main(arguments)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[list[float]]:
    names = ("loss", "supervised_loss", "unsupervised_loss")
    return [[row[name] for name in names] for row in records(run)]


def assert_alike(found: Path, expected: Path, tolerance: float) -> None:
    pairs = zip(curve(found), curve(expected), strict=True)
    assert all(a == pytest.approx(b, rel=tolerance, abs=1e-7) for a, b in pairs)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (found, expected)]
    scores = [
        {key: value for key, value in summary.items() if "distance" in key or "accuracy" in key}
        for summary in summaries
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert len(scores[0]) == 2 * 3 + 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_rank_and_two_that_stop_and_go_on_are_equal(folder: Path, algorithm: str) -> None:
    assert run_ranks(1, train, folder, algorithm, f"{algorithm}-one", STEPS) == [0]
    assert run_ranks(2, train, folder, algorithm, f"{algorithm}-two", 3) == [0, 0]
    assert run_ranks(2, train, folder, algorithm, f"{algorithm}-two", STEPS) == [0, 0]
    one, two = (folder / "runs" / f"{algorithm}-{ranks}" for ranks in ("one", "two"))
    assert len(curve(one)) == STEPS
    assert_alike(two, one, 1e-5)
    assert any(row[2] > 0 for row in curve(one)) == (algorithm != "supervised")
    assert json.loads((one / "classes.json").read_text()) == list(map(str, GRADES))


@pytest.mark.slow
def test_the_command_is_killed_goes_on_and_its_scores_are_the_tasks(folder: Path) -> None:
    command = [sys.executable, "-m", "hpdist", "train", "fixmatch.yaml", "--run.name"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = (folder / "runs" / name for name in ("whole", "killed"))
    subprocess.run([*command, "whole"], cwd=folder, env=environment, check=True)
    killer = "import toy_kill, sys; from hpdist.cli import main; sys.exit(main(sys.argv[1:]))"
    (folder / "toy_kill.py").write_text(
        "import os\nfrom hpdist.train.step import SemiSupervisedStep as Step\n"
        "call = Step.__call__\n"
        "def dying(self, *args, **options):\n"
        "    if self.attempts == 5:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return call(self, *args, **options)\n"
        "Step.__call__ = dying\n"
    )
    arguments = [*command[3:], "killed"]
    died = subprocess.run([sys.executable, "-c", killer, *arguments], cwd=folder, env=environment)
    assert died.returncode == -9
    assert not (killed / "summary.json").exists()
    subprocess.run([*command, "killed"], cwd=folder, env=environment, check=True)
    assert_alike(killed, whole, 0.0)
    _check_scores(whole)


def _check_scores(run: Path) -> None:
    """Its headline follows from the confusion matrix, chooses the best step, and is in the log."""
    counts = np.array(json.loads((run / "confusion_test.json").read_text())["teacher"])
    assert counts.shape == (4, 4)
    assert counts.sum() == ROWS["test"]
    ranks = np.arange(4)
    distance = (counts * np.abs(ranks[:, None] - ranks)).sum() / counts.sum()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/mean_distance"] == pytest.approx(distance)
    assert summary["test/accuracy"] == pytest.approx(counts.trace() / counts.sum())
    measured = [row.get("eval/validation/mean_distance") for row in records(run)]
    best = min(value for value in measured if value is not None)
    assert summary["validation/best_mean_distance"] == pytest.approx(best)
    assert "pseudo_label_top_share" in records(run)[0]
    assert len(records(run)[0]["pseudo_labels"]) == 4


def test_the_report_draws_what_the_task_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(1, train, folder, "supervised", "reported", STEPS) == [0]
    run = folder / "runs" / "reported"
    monkeypatch.chdir(folder.parent)  # from where the task's module cannot be imported
    assert cli.main(["report", str(run), "--out", str(folder / "page.html")]) == 0
    page = (folder / "page.html").read_text()
    assert page.count("<figcaption>Mean distance to the right class</figcaption>") == 1
    assert "<figcaption>Accuracy</figcaption>" not in page
    assert "<th>validation/best_mean_distance</th>" in page
    assert "<h2>Confusion matrices</h2>" in page
    (run / "task.json").write_text(
        json.dumps({**json.loads((run / "task.json").read_text()), "charts": []})
    )
    assert cli.main(["report", str(run), "--out", str(folder / "page.html")]) == 0
    assert "<h2>Confusion matrices</h2>" not in (folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithm", "freematch"], "no meaning for ordinal, which has no exclusive classes"),
        (["--algorithm", "vat"], "which has no divergence"),
        (["--task.cutoff", "2"], "task.cutoff: must be greater than 0 and less than 1, not 2"),
        (["--task.cutof", "0.2"], "task.cutof: unknown setting, did you mean 'cutoff'?"),
        (["--task.name", "python:toy_ordinal:Nothing"], "has no 'Nothing'"),
        (["--task.name", "python:toy_ordinal:Ranks"], "is not a config class of task options"),
    ],
)
def test_what_is_wrong_is_refused(
    folder: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["train", "fixmatch.yaml", "--run.name", "wrong", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs" / "wrong").exists()


def test_the_class_of_the_task_names_its_options_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpdist.train.config import load

    monkeypatch.chdir(folder)
    named = load(folder / "fixmatch.yaml", ["--task", "python:toy_ordinal:Ordinal"]).task
    assert type(named).__name__ == "OrdinalConfig"
    assert vars(named.build()) == {"cutoff": 0.5}  # type: ignore[attr-defined]
