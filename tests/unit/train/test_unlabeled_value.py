"""One table with empty labels: the rows without one are the unlabelled set of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from hpdist.data.config import Data, Labeled
from hpdist.errors import ConfigError, DataError
from hpdist.evaluate.load import load
from hpdist.tasks import make_task
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.support.labeled import open_labeled

ROWS, LABELED = 60, 12


def frame(mark: Any = -1) -> pd.DataFrame:
    """Two features, and a label that only the first rows have."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, ROWS)
    columns: dict[str, Any] = {f"x{n}": draws.normal(size=ROWS) + labels for n in range(2)}
    values: list[Any] = labels.tolist()
    columns["label"] = values[:LABELED] + [mark] * (ROWS - LABELED)
    return pd.DataFrame(columns)


def arrays() -> tuple[Any, Any]:
    rows = frame()
    return rows[["x0", "x1"]].to_numpy(np.float32), rows["label"].to_numpy()


SETTINGS: dict[str, Any] = {
    "batch": {"labeled": 4, "unlabeled": 8},
    "tracker": {"name": "none"},
    "steps": 12,
    "schedule": {"name": "constant"},
}
MODEL = {"name": "mlp", "hidden": [4]}
MARK = {"unlabeled_value": -1}


def trained(
    tmp_path: Path, name: str, labeled: Any, algorithm: str = "fixmatch", **more: Any
) -> Trainer:
    run = {"dir": str(tmp_path / "runs"), "name": name}
    return Trainer(
        MODEL, {"name": algorithm, "threshold": 0.5}, labeled=labeled, run=run, **(SETTINGS | more)
    )


def stored(tmp_path: Path, kind: str, rows: pd.DataFrame) -> Any:
    """The same rows, given in one of the ways in which rows can be given."""
    path = tmp_path / f"rows.{kind}"
    if kind == "arrays":
        return (*arrays(), MARK)
    if kind == "tensors":
        return (*map(torch.from_numpy, arrays()), MARK)
    if kind == "frame":
        return rows, MARK
    if kind == "dataset":
        return datasets.Dataset.from_pandas(rows, preserve_index=False), MARK
    if kind == "csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_parquet(path)
    return {"path": kind, "data_files": str(path), **MARK}


@pytest.mark.parametrize("kind", ["arrays", "tensors", "frame", "dataset", "csv", "parquet"])
def test_rows_without_a_label_are_the_unlabelled_set(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with trained(tmp_path, "run", stored(tmp_path, kind, frame())) as trainer:
        assert trainer.data.labeled.ids.tolist() == list(range(LABELED))
        assert trainer.data.unlabeled.ids.tolist() == list(range(LABELED, ROWS))
        assert trainer.data.unlabeled_rows == ROWS - LABELED
        trainer.fit()
    text = capfd.readouterr().err
    assert "unlabelled: 48 rows in a table" in text
    assert f"data.labeled: {LABELED} of {ROWS} rows have a label in column 'label'; " in text
    assert "the other 48 (-1) are the unlabelled set" in text


@pytest.mark.parametrize("algorithm", ["fixmatch", "flexmatch"])
def test_a_run_goes_on_with_the_same_rows(algorithm: str, tmp_path: Path) -> None:
    source = stored(tmp_path, "csv", frame()) | {"labels_per_class": 3}
    whole = trained(tmp_path, "whole", source, algorithm)
    whole.fit()
    trained(tmp_path, "parts", source, algorithm, steps=5).fit()
    parts = trained(tmp_path, "parts", source, algorithm)
    assert parts.step.applied_steps == 5
    parts.fit()
    one, other = whole.teacher_model().state_dict(), parts.teacher_model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = configuration.load(tmp_path / "runs/whole/config.yaml")
    assert again.data.labeled.unlabeled_value == -1
    assert again.data.unlabeled is None


def test_drawn_labels_leave_the_other_labelled_rows_out(tmp_path: Path) -> None:
    with trained(tmp_path, "run", (frame(), {"rows": 4, **MARK})) as trainer:
        assert len(trainer.data.labeled) == 4
        assert trainer.data.unlabeled.ids.tolist() == list(range(LABELED, ROWS))


@pytest.mark.parametrize(
    ("mark", "value"),
    [(None, None), ("?", "?"), (-1.0, -1), (7, 7), ("-1", -1), (float("nan"), None)],
)
def test_any_value_may_stand_for_no_label(mark: Any, value: Any) -> None:
    rows = frame(mark)
    if isinstance(mark, str):
        rows["label"] = rows["label"].astype(str)
    data = datasets.Dataset.from_pandas(rows, preserve_index=False)
    config = Labeled(path="m", input=["x0", "x1"], label="label", unlabeled_value=value)
    labeled = open_labeled(config, 0, dataset=data)
    assert labeled.classes.names == ("0", "1")
    assert labeled.unlabeled_ids is not None
    assert labeled.unlabeled_ids.tolist() == list(range(LABELED, ROWS))


def test_numbers_and_lists_may_be_marked_too() -> None:
    data = datasets.Dataset.from_dict({"x": [[1.0], [2.0], [3.0]], "y": [-1.0, 0.5, 2.0]})
    config = Labeled(path="m", input="x", label="y", unlabeled_value=-1)
    labeled = open_labeled(config, 0, dataset=data, labels=make_task(name="regression"))
    assert labeled.ids.tolist() == [1, 2]
    lists = datasets.Dataset.from_dict({"x": [[1.0], [2.0]], "y": [[0, 1, 1], [-1, -1, -1]]})
    labeled = open_labeled(config, 0, dataset=lists, labels=make_task(name="multilabel"))
    assert labeled.ids.tolist() == [0]


def test_without_such_a_value_they_are_passed_over() -> None:
    data = datasets.Dataset.from_pandas(frame(), preserve_index=False)
    labeled = open_labeled(Labeled(path="m", input=["x0"], label="label"), 0, dataset=data)
    assert labeled.unlabeled_ids is None
    assert any("passed over" in note for note in labeled.notes)


def test_the_model_never_sees_the_labels(tmp_path: Path) -> None:
    with trained(tmp_path, "run", (frame(), MARK)) as trainer:
        assert trainer.data.unlabeled.column == ("x0", "x1")
        assert "label" not in trainer.data.unlabeled.dataset.column_names


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    labeled = {"path": "a", "unlabeled_value": -1}
    with pytest.raises(ValueError, match="leave one of them out"):
        Data.model_validate({"labeled": labeled, "unlabeled": {"path": "b"}})
    with pytest.raises(ValueError, match="unlabeled_value"):
        Data.model_validate({"labeled": labeled | {"unlabeled_value": True}})
    with pytest.raises(DataError, match=r"no row has 9 in column 'label'"):
        trained(tmp_path, "a", (frame()[:LABELED], {"unlabeled_value": 9}))
    classes = datasets.Features(
        {
            "x": datasets.List(datasets.Value("float64")),
            "label": datasets.ClassLabel(names=["a", "?"]),
        }
    )
    data = datasets.Dataset.from_dict({"x": [[0.0], [1.0]], "label": [0, 1]}, features=classes)
    with pytest.raises(DataError, match=r"unlabeled_value: '\?' is the class '\?' of column"):
        trained(tmp_path, "b", (data, {"unlabeled_value": "?"}))
    with pytest.raises(ConfigError, match=r"labeled: X has 60 rows and y has 59"):
        trained(tmp_path, "c", (arrays()[0], arrays()[1][1:]))


def test_a_value_of_zero_is_a_value() -> None:
    assert Labeled(path="m", unlabeled_value=0).marks_unlabeled
    assert not Labeled(path="m", unlabeled_value=False).marks_unlabeled
    assert not Labeled(path="m").marks_unlabeled
    assert Labeled(path="m", unlabeled_value=None).marks_unlabeled


def test_rows_so_marked_in_a_test_set_are_passed_over_then_and_later(tmp_path: Path) -> None:
    rows = frame()
    rows.loc[rows.index[:LABELED], "label"] += 5
    rows.loc[rows.index[LABELED:], "label"] = 0
    held = tmp_path / "held.parquet"
    rows.to_parquet(held)
    settings = {"unlabeled_value": 0, "input": ["x0", "x1"], "label": "label"}
    test = {"path": "parquet", "data_files": str(held)}
    trainer = trained(tmp_path, "run", (rows, settings), test=test)
    summary = trainer.fit()
    assert summary["test/rows"] == LABELED
    found = load(tmp_path / "runs/run").evaluate()
    assert found["accuracy"] == pytest.approx(summary["test/accuracy"])
