"""A run says at its start which test rows it trains on: one process looks, and all know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch.distributed as dist

from hpdist.train.trainer import Trainer
from tests.support.ranks import run_ranks


def write(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32).tolist()
    sets = {"labeled": rows[:8], "unlabeled": rows[8:50], "test": [*rows[52:58], rows[3], rows[20]]}
    for name, values in sets.items():
        columns = {"x": values, "label": [number % 2 for number in range(len(values))]}
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{name}.parquet"))


def train(folder: Path, steps: int) -> dict[str, object]:
    from hpdist.train import other_sets as run_data

    find = run_data.find_duplicates

    def by_main(*sets: Any) -> Any:
        assert not dist.is_initialized() or dist.get_rank() == 0
        assert steps == 1, "the rows were compared again"
        return find(*sets)

    run_data.find_duplicates = by_main
    files = {
        name: {"path": "parquet", "data_files": str(folder / f"{name}.parquet"), "input": "x"}
        for name in ("labeled", "unlabeled", "test")
    }
    return Trainer(
        {"name": "mlp", "hidden": [8]},
        "pi_model",
        labeled=files["labeled"],
        unlabeled=files["unlabeled"] | {"streaming": True},
        test=files["test"],
        views={"name": "table"},
        batch={"labeled": 4, "unlabeled": 4},
        schedule={"name": "constant"},
        steps=steps,
        run={"dir": str(folder), "name": "run"},
        tracker={"name": "tensorboard"},
    ).fit()


def test_one_of_two_ranks_compares_and_a_resumed_run_does_not(tmp_path: Path) -> None:
    write(tmp_path)
    for steps in (1, 2):
        for summary in run_ranks(2, train, tmp_path, steps):
            assert summary["test/duplicates_in_labeled"] == 1
            assert summary["test/duplicates_in_unlabeled"] == 1
    kept = json.loads((tmp_path / "run" / "duplicates.json").read_text())
    (line,) = kept["lines"]
    assert "test.parquet, row 6) is row 3 (" in line
    assert f", row 7) is {tmp_path / 'unlabeled.parquet'}, row group 0, row 12" in line
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["test/duplicates_in_unlabeled"] == 1
