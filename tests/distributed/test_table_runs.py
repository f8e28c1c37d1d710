"""Training on a table: the same on any number of ranks; a resumed run measures nothing anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.ranks import run_ranks

COLUMNS = ["a", "b", "c"]


def values(rows: int, seed: int) -> dict[str, list[Any]]:
    drawn = np.random.default_rng(seed).normal([5, 0, -300], [1, 20, 100], (rows, 3))
    drawn = drawn.astype(np.float32).astype(float)
    columns: dict[str, list[Any]] = {name: drawn[:, k].tolist() for k, name in enumerate(COLUMNS)}
    columns["label"] = (drawn[:, 0] > 5).astype(int).tolist()
    columns["b"][1] = None
    return columns


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    for number, (name, rows) in enumerate({"labeled": 16, "unlabeled": 90, "test": 21}.items()):
        table = datasets.Dataset.from_dict(values(rows, number))
        table.to_parquet(str(folder / f"{name}.parquet"))
    return folder


def train(
    data: Path,
    runs: Path,
    name: str,
    steps: int,
    measured: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, object]:
    """Train on this rank; where the rows were `measured` before, that must not be done again."""
    from hpdist.data.views import TableViews
    from hpdist.train.trainer import Trainer

    if measured:
        TableViews.fit = _again  # type: ignore[method-assign]
    files = {
        name: {"path": "parquet", "data_files": str(data / f"{name}.parquet")}
        for name in ("labeled", "unlabeled", "test")
    }
    trainer = Trainer(
        {"name": "mlp", "hidden": [16]},
        {"name": "fixmatch", "threshold": 0.6},
        labeled=files["labeled"] | {"input": COLUMNS},
        unlabeled=files["unlabeled"],
        test=files["test"],
        views={"name": "table", "missing": "mean", **(settings or {})},
        batch={"labeled": 4, "unlabeled": 12},
        schedule={"name": "constant"},
        steps=steps,
        run={"dir": str(runs), "name": name},
        log={"every": 1},
        tracker={"name": "none"},
    )
    return trainer.fit()


def _again(*_: Any) -> None:
    raise AssertionError("the rows were measured again")


def curve(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_runs_are_equal_on_any_ranks_and_resume_with_what_was_measured(
    data: Path, tmp_path: Path
) -> None:
    (one,) = run_ranks(1, train, data, tmp_path, "one", 6)
    run_ranks(2, train, data, tmp_path, "two", 3)
    (two,) = run_ranks(1, train, data, tmp_path, "two", 6, True)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-4)
    assert len(curve(tmp_path / "one")) == 6
    assert two["test/accuracy"] == one["test/accuracy"]
    kept = [
        load_file(tmp_path / run / "checkpoints/step-00000006/common.safetensors")
        for run in ("one", "two")
    ]
    trained = [values(16, 0), values(90, 1)]
    rows = np.concatenate([np.array([part[c] for c in COLUMNS], float).T for part in trained])
    for found in kept:
        np.testing.assert_allclose(found["views/mean"], np.nanmean(rows, axis=0), rtol=1e-6)
        np.testing.assert_allclose(found["views/std"], np.nanstd(rows, axis=0), rtol=1e-6)
        assert found["views/rows"].shape == (106, 3)


def test_rows_that_are_not_standardised_train_otherwise(data: Path, tmp_path: Path) -> None:
    run_ranks(1, train, data, tmp_path, "raw", 2, False, {"standardize": False})
    assert curve(tmp_path / "raw")[0] > 5
