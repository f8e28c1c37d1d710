"""Runs on several labels and on numbers, from Parquet: on any number of ranks, and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import List, Value
from safetensors.torch import load_file

from hpdist.errors import CheckpointError, ConfigError
from tests.support.ranks import run_ranks

ROWS = {"labeled": 16, "unlabeled": 70, "test": 21, "validation": 13}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "multilabel": {"name": "fixmatch", "threshold": 0.55},
    "regression": {"name": "temporal_ensembling", "ramp": 0.0},
}


def labels_of(rows: np.ndarray, task: str) -> tuple[list[Any], Any]:
    if task == "multilabel":
        lists = [np.flatnonzero(row > 0.3).tolist() for row in rows[:, :4]]
        return lists, List(Value("int64"))
    targets = np.stack([5000 + 40 * rows[:, 0], rows[:, 1] * rows[:, 2]], axis=1)
    return targets.tolist(), List(Value("float32"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for number, (name, count) in enumerate(ROWS.items()):
        rows = np.random.default_rng(number).normal(size=(count, 6)).astype(np.float32)
        for task in ALGORITHMS:
            features = {"x": List(Value("float32"), length=6)}
            columns: dict[str, Any] = {"x": rows.tolist()}
            if name != "unlabeled":
                columns["label"], features["label"] = labels_of(rows, task)
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(str(folder / f"{task}-{name}.parquet"))
    return folder


def train(
    data: Path,
    runs: Path,
    name: str,
    task: str,
    steps: int,
    measured: bool = False,
    **changes: Any,
) -> dict[str, object]:
    """Train on this rank; where the targets were `measured` before, that must not be done again."""
    from hpdist.tasks.regression import Scale
    from hpdist.train.trainer import Trainer

    if measured:
        Scale.of = _again  # type: ignore[method-assign]

    files = {
        part: {"path": "parquet", "data_files": str(data / f"{task}-{part}.parquet"), "input": "x"}
        for part in ROWS
    }
    settings = {
        "algorithm": ALGORITHMS[task],
        "task": {"name": task},
        "views": {"name": "table"},
        "batch": {"labeled": 4, "unlabeled": 36},
        "schedule": {"name": "constant"},
        "eval": {"every": 3},
        **changes,
    }
    trainer = Trainer(
        {"name": "mlp", "hidden": [16]},
        labeled=files["labeled"],
        unlabeled=files["unlabeled"],
        test=files["test"],
        validation=files["validation"],
        steps=steps,
        run={"dir": str(runs), "name": name},
        log={"every": 1},
        tracker={"name": "none"},
        **settings,
    )
    return trainer.fit()


def _again(*_: Any) -> None:
    raise AssertionError("the targets were measured again")


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["unsupervised_loss"]) for row in records(folder)]


SCORES = {
    "multilabel": ("mean_average_precision", "micro_f1", "macro_f1", "exact_match"),
    "regression": ("rmse", "mae", "r2"),
}


@pytest.mark.parametrize("task", ["multilabel", pytest.param("regression", marks=pytest.mark.slow)])
def test_runs_are_equal_on_any_ranks_and_resume(data: Path, tmp_path: Path, task: str) -> None:
    (one,) = run_ranks(1, train, data, tmp_path, "one", task, 6)
    run_ranks(2, train, data, tmp_path, "two", task, 3)
    two, _ = run_ranks(2, train, data, tmp_path, "two", task, 6, True)
    assert len(curve(tmp_path / "one")) == 6
    for found, expected in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(unsupervised > 0 for _, unsupervised in curve(tmp_path / "one"))
    assert not any("pseudo_label_top_share" in row for row in records(tmp_path / "one"))
    for name in SCORES[task]:
        assert two[f"test/{name}"] == pytest.approx(one[f"test/{name}"], rel=1e-3, abs=1e-5)
        assert f"eval/validation/{name}_student" in records(tmp_path / "one")[2]
    headline = SCORES[task][0]
    evaluated = [row[f"eval/validation/{headline}"] for row in records(tmp_path / "one")[2::3]]
    best = min(evaluated) if task == "regression" else max(evaluated)
    assert one[f"validation/best_{headline}"] == pytest.approx(best)
    assert f"test/{headline}_student" in one
    assert not list((tmp_path / "one").glob("confusion*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("task", ALGORITHMS)
def test_half_precision_under_zero_is_close_to_fp32(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    precision: str,
    stage: int,
) -> None:
    monkeypatch.setenv("HPDIST_ALLOW_CPU_FP16", "1")
    (one,) = run_ranks(1, train, data, tmp_path, "one", task, 6)
    half = {"precision": precision, "zero": {"stage": stage}, "loss_scale": {"initial": 128.0}}
    two, _ = run_ranks(2, partial(train, **half), data, tmp_path, "two", task, 6)
    assert (two["precision"], two["zero_stage"], two["skipped_steps"]) == (precision, stage, 0)
    for found, expected in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=0.03, abs=0.01)
    assert any(unsupervised > 0 for _, unsupervised in curve(tmp_path / "two"))
    headline = f"test/{SCORES[task][0]}"
    assert two[headline] == pytest.approx(one[headline], rel=0.05)


def test_targets_are_in_their_own_units_and_their_scale_in_the_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    task = "regression"
    summary = train(
        data,
        tmp_path,
        "long",
        task,
        300,
        algorithm={"name": "supervised"},
        views={"name": "table", "weak": {"noise": 0.0}},
        teacher={"decay": 0.9},
        optim={"name": "adam", "lr": 0.01, "weight_decay": 0.0},
        eval={"every": 300},
    )
    read = datasets.Dataset.from_parquet(str(data / f"{task}-labeled.parquet"))
    targets = np.array(read["label"], float)
    folder = tmp_path / "long" / "checkpoints" / "step-00000300"
    kept = load_file(folder / "common.safetensors")
    np.testing.assert_allclose(kept["targets/mean"], targets.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(kept["targets/std"], targets.std(axis=0), rtol=1e-12)
    # The first target is 5000 + 40 x_0, of x_0 standard normal, and the second about 1.
    assert 2 < float(summary["test/rmse"]) < 30  # type: ignore[arg-type]
    assert records(tmp_path / "long")[-1]["loss"] < 0.01


def test_a_run_of_another_task_is_not_continued(data: Path, tmp_path: Path) -> None:
    plain = {"algorithm": {"name": "supervised"}}
    train(data, tmp_path, "run", "multilabel", 1, **plain)
    with pytest.raises(CheckpointError, match=r"task.name: multilabel there, regression here"):
        train(data, tmp_path, "run", "regression", 2, **plain)


def test_an_algorithm_that_cannot_do_it_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.name: FixMatch has no meaning for regression"):
        train(tmp_path, tmp_path, "run", "regression", 1, algorithm={"name": "fixmatch"})
    assert not (tmp_path / "run").exists()


def test_a_score_that_is_nan_is_never_the_best(data: Path, tmp_path: Path) -> None:
    """Of a validation set without a positive label there is no average precision."""
    rows = datasets.Dataset.from_parquet(str(data / "multilabel-validation.parquet"))
    none = datasets.Dataset.from_dict(
        {"x": rows["x"], "label": [[] for _ in rows["x"]]}, features=rows.features
    )
    folder = tmp_path / "none"
    folder.mkdir()
    for part in ("labeled", "unlabeled", "test"):
        (folder / f"multilabel-{part}.parquet").symlink_to(data / f"multilabel-{part}.parquet")
    none.to_parquet(str(folder / "multilabel-validation.parquet"))
    summary = train(
        folder,
        tmp_path,
        "run",
        "multilabel",
        2,
        algorithm={"name": "supervised"},
        eval={"every": 1},
    )
    assert "validation/best_mean_average_precision" not in summary
    assert np.isnan(float(summary["validation/mean_average_precision"]))  # type: ignore[arg-type]
