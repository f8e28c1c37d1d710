"""Whole runs that find drawn shapes: on any number of ranks, measured, predicted and exported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

import hpdist
from hpdist import cli
from hpdist.data.samples.shapes import NAMES, write_shapes
from hpdist.errors import ConfigError
from tests.support.ranks import run_ranks

ROWS = {"labeled": 8, "unlabeled": 12, "test": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), ROWS, size=32)


def train(
    data: Path, runs: Path, name: str, steps: int, norm: str = "batch", **changes: Any
) -> dict[str, object]:
    from hpdist.train.trainer import Trainer

    files = {
        part: {"path": "parquet", "data_files": str(data / f"{part}.parquet")} for part in ROWS
    }
    settings: dict[str, Any] = {
        "task": {"name": "detection"},
        "algorithm": {"name": "fixmatch", "targets": "teacher", "threshold": 0.12, "burn_in": 1},
        "batch": {"labeled": 4, "unlabeled": 8},
        "optim": {"name": "sgd", "lr": 0.01},
        "schedule": {"name": "constant"},
        "teacher": {"decay": 0.5},
        **changes,
    }
    trainer = Trainer(
        {"name": "center_net", "width": 8, "depth": 1, "norm": norm},
        labeled=files["labeled"],
        unlabeled=files["unlabeled"],
        test=files["test"],
        steps=steps,
        run={"dir": str(runs), "name": name},
        log={"every": 1, "examples": 0},
        tracker={"name": "none"},
        **settings,
    )
    return trainer.fit()


def curve(folder: Path) -> list[dict[str, float]]:
    names = ("supervised_loss", "unsupervised_loss", "pseudo_boxes", "grad_norm")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: record.get(name, 0) for name in names} for record in map(json.loads, lines)]


def close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-4)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    runs = tmp_path_factory.mktemp("runs")
    summary = train(data, runs, "alone", 3)
    assert {"test/map", "test/map_50", "test/map_75", "test/map_student"} <= summary.keys()
    return runs / "alone"


def test_two_ranks_train_as_one(data: Path, alone: Path, tmp_path: Path) -> None:
    run_ranks(2, partial(train, data, tmp_path, "two", 3))
    wanted = curve(alone)
    assert wanted[1]["pseudo_boxes"] > 1
    assert wanted[1]["unsupervised_loss"] > 0
    close(curve(tmp_path / "two"), wanted)
    scores = [json.loads((run / "summary.json").read_text()) for run in (alone, tmp_path / "two")]
    assert scores[1]["test/map_50"] == pytest.approx(scores[0]["test/map_50"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "pseudo_label", "fixmatch"])
def test_micro_batches_and_four_ranks_train_as_one(data: Path, tmp_path: Path, name: str) -> None:
    """Batch normalisation goes by the rows of a pass, and is left out here."""
    options = {} if name == "supervised" else {"threshold": 0.12}
    options |= {"ramp": 0.0} if name == "pseudo_label" else {}
    settings: dict[str, Any] = {"algorithm": {"name": name, **options}, "norm": "group"}
    train(data, tmp_path, "one", 3, **settings)
    rows = 4 if name == "supervised" else 12
    parts = {"batch": {"labeled": 4, "unlabeled": 8, "micro": rows // 4}}
    train(data, tmp_path, "parts", 3, **settings, **parts)
    close(curve(tmp_path / "parts"), curve(tmp_path / "one"))
    run_ranks(4, partial(train, data, tmp_path, "four", 3, **settings))
    close(curve(tmp_path / "four"), curve(tmp_path / "one"))


def test_a_run_is_measured_and_predicted_again(data: Path, alone: Path, tmp_path: Path) -> None:
    predictor = hpdist.load(alone)
    summary = json.loads((alone / "summary.json").read_text())
    scores = predictor.evaluate()
    assert scores["map"] == pytest.approx(summary["test/map"], abs=1e-6)
    assert {f"map/{name}" for name in NAMES} & scores.keys()
    out = tmp_path / "predicted"
    assert cli.main(["predict", str(alone), str(data / "test.parquet"), "--out", str(out)]) == 0
    table = pq.read_table(out)
    assert table.num_rows == ROWS["test"]
    assert str(table.schema.field("boxes").type) == "list<element: list<element: float>>"
    for row in table.to_pylist():
        assert len(row["label"]) == len(row["boxes"]) == len(row["scores"])


@pytest.mark.slow  # torch.onnx takes many seconds
def test_the_maps_are_exported(alone: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    verified = hpdist.load(alone).export(file)
    assert verified.relative < 1e-4
    assert hpdist.load(file).evaluate() == pytest.approx(
        hpdist.load(alone).evaluate(), abs=1e-3, nan_ok=True
    )


def test_one_class_and_no_boxes_anywhere(data: Path, tmp_path: Path) -> None:
    """Pictures of nothing: the loss is that of the background, and no score is made up."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=["thing"])),
            },
        }
    )
    folder = tmp_path / "empty"
    folder.mkdir()
    for part in ROWS:
        table = datasets.Dataset.from_parquet(str(data / f"{part}.parquet"))
        columns: dict[str, Any] = {
            "image": list(table.cast_column("image", features["image"])["image"])
        }
        columns["objects"] = [{"bbox": [], "category": []}] * len(table)
        made = datasets.Dataset.from_dict(columns, features=features)
        made = made if part != "unlabeled" else made.remove_columns("objects")
        made.to_parquet(str(folder / f"{part}.parquet"))
    summary = train(folder, tmp_path, "run", 2)
    assert summary["test/map"] is None or summary["test/map"] != summary["test/map"]
    for record in curve(tmp_path / "run"):
        assert 0 < record["supervised_loss"] < 100


def test_an_algorithm_without_a_meaning_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"FreeMatch has no meaning for detection"):
        train(tmp_path / "nowhere", tmp_path, "run", 1, algorithm={"name": "freematch"})
