"""How labels that are lists or numbers are read, from Parquet, and what is refused by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.errors import ConfigError, DataError
from hpdist.tasks import make_task
from hpdist.tasks.base import Task
from hpdist.train.config import RunConfig, parse
from tests.support.labeled import open_labeled

SEVERAL = make_task(name="multilabel")
NUMBERS = make_task(name="regression")


def written(folder: Path, name: str, labels: list[Any], feature: Any) -> dict[str, Any]:
    """A Parquet file of vectors with these labels, as a source."""
    features = Features({"x": List(Value("float32"), length=2), "label": feature})
    rows = {"x": [[float(row), 1.0] for row in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return {"path": "parquet", "data_files": str(folder / f"{name}.parquet"), "input": "x"}


def opened(
    folder: Path, labels: list[Any], feature: Any, task: Task, **settings: Any
) -> LabeledRows:
    config = Labeled(**written(folder, "labeled", labels, feature), **settings)
    return open_labeled(config, 0, labels=task)


def held_out(folder: Path, like: LabeledRows, labels: list[Any], feature: Any) -> LabeledRows:
    config = LabelColumn(**written(folder, "test", labels, feature))
    return open_test(config, like, input_spec(like))


TAGS = ClassLabel(names=["cat", "dog", "owl"])
LISTS: dict[str, tuple[list[Any], Any]] = {
    "classes": ([[0], [2, 1], []], List(TAGS)),
    "numbers": ([[0], [2, 1], []], List(Value("int64"))),
    "strings": ([["cat"], ["owl", "dog"], []], List(Value("string"))),
    "vectors": ([[1, 0, 0], [0, 1, 1], [0, 0, 0]], List(Value("int8"))),
    "fixed": ([[1, 0, 0], [0, 1, 1], [0, 0, 0]], List(Value("int8"), length=3)),
    "booleans": ([[True, False, False], [False, True, True], [False] * 3], List(Value("bool"))),
    "floats": ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0] * 3], List(Value("float32"))),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_classes_and_vectors_are_the_same_labels(tmp_path: Path, kind: str) -> None:
    labels, feature = LISTS[kind]
    rows = opened(tmp_path, labels, feature, SEVERAL)
    expected = [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    if kind == "strings":  # sorted
        assert rows.classes.names == ("cat", "dog", "owl")
    assert rows.labels.dtype == np.float32
    assert rows.labels.tolist() == expected
    test = held_out(tmp_path, rows, labels[::-1], feature)
    assert test.labels.tolist() == expected[::-1]


def test_pairs_of_0_and_1_must_be_told_apart(tmp_path: Path) -> None:
    pairs = [[0, 1], [1, 0]]
    with pytest.raises(DataError, match=r"pairs of 0 and 1.*task.labels: ids"):
        opened(tmp_path, pairs, List(Value("int64")), SEVERAL)
    for way, expected in (("vector", [[0, 1], [1, 0]]), ("ids", [[1, 1], [1, 1]])):
        task = make_task(name="multilabel", labels=way)
        assert opened(tmp_path, pairs, List(Value("int64")), task).labels.tolist() == expected
    repeated = [[0, 1], [1, 1]]
    rows = opened(tmp_path, repeated, List(Value("int64")), SEVERAL)
    assert rows.labels.tolist() == repeated


WRONG: list[tuple[list[Any], Any, Task, str]] = [
    ([[0], [1, None]], List(TAGS), SEVERAL, r"row 1 .*has .*None is none of the 3 classes"),
    ([[1, 0, 1], [1, 0]], List(Value("float32")), SEVERAL, r"row 1 .* 2 values for 3 classes"),
    ([[1, 0], [0.5, 0]], List(Value("float32")), SEVERAL, r"row 1 .* not all 0 or 1"),
    ([[1, 0], [float("nan"), 0]], List(Value("float32")), SEVERAL, r"row 1 .* not all 0 or 1"),
    ([0, 1], TAGS, SEVERAL, r"column 'label' is ClassLabel.*needs lists"),
    ([[0], [0]], List(Value("int64")), SEVERAL, r"has 1 classes, .* two or more"),
    ([[0], [1]], List(TAGS), make_task(), r"holds lists; .* task.name: multilabel"),
    ([1.0, float("inf")], Value("float64"), NUMBERS, r"row 1 .* it is not finite"),
    ([[1.0, 2.0], [1.0]], List(Value("float32")), NUMBERS, r"row 1 .* 1 numbers, .* has 2"),
    ([[1.0, 2.0], [1.0, None]], List(Value("float32")), NUMBERS, r"row 1 .* it holds nulls"),
    (["a", "b"], Value("string"), NUMBERS, r"task.name: regression needs a number"),
    ([0, 1], TAGS, NUMBERS, r"task.name: regression needs a number"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_labels_that_do_not_fit_are_refused_by_row(tmp_path: Path, case: int) -> None:
    labels, feature, task, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        opened(tmp_path, labels, feature, task)


def test_a_bad_row_that_is_not_used_does_not_matter(tmp_path: Path) -> None:
    several = opened(tmp_path, [[0], None, [1]], List(TAGS), SEVERAL, indices=[0, 2])
    assert several.labels.tolist() == [[1, 0, 0], [0, 1, 0]]
    numbers = opened(tmp_path, [1.0, None, 3.0], Value("float64"), NUMBERS, indices=[0, 2])
    assert numbers.labels.tolist() == [[-1], [1]]


def test_a_test_row_is_held_to_the_same(tmp_path: Path) -> None:
    like = opened(tmp_path, [[0], [1, 2]], List(TAGS), SEVERAL)
    with pytest.raises(DataError, match=r"data.test .*row 1 .*has the label \[0, None\]"):
        held_out(tmp_path, like, [[0], [0, None]], List(TAGS))
    with pytest.raises(DataError, match=r"data.test.label: .* needs lists"):
        held_out(tmp_path, like, [0, 1], TAGS)


def test_targets_are_standardised_by_the_labelled_rows_in_use(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).normal([1.7e9, -3.0], [100.0, 0.01], (40, 2))
    feature = List(Value("float64"))
    rows = opened(tmp_path, drawn.tolist(), feature, NUMBERS, rows=10)
    used = drawn[rows.ids]
    mean, std = used.mean(axis=0), used.std(axis=0)
    assert rows.classes.names == ("label[0]", "label[1]")
    np.testing.assert_allclose(rows.labels, (used - mean) / std, rtol=1e-5, atol=1e-6)
    other = drawn * 2
    test = held_out(tmp_path, rows, other.tolist(), feature)
    np.testing.assert_allclose(test.labels, (other - mean) / std, rtol=1e-6)


def test_a_target_that_never_changes_is_only_moved(tmp_path: Path) -> None:
    rows = opened(tmp_path, [[0.1, 1.0], [0.1, 3.0]], List(Value("float64")), NUMBERS)
    np.testing.assert_allclose(rows.labels, [[0, -1], [0, 1]], atol=1e-6)


def config(**changes: Any) -> RunConfig:
    data = {"labeled": {"path": "x", **changes.pop("labeled", {})}}
    return parse(
        {
            "model": {"name": "mlp"},
            "data": data,
            "algorithm": {"name": "supervised"},
            "steps": 1,
            **changes,
        }
    )


def test_what_was_once_written_down_for_every_task_is_taken() -> None:
    for name in ("classification", "regression"):
        task = config(task={"name": name, "labels": "auto", "threshold": 0.5}).task
        assert task.model_dump() == {"name": name}
    assert config(task=None).task == config(task={}).task == config().task


def test_settings_that_go_by_a_rows_class_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.labeled.labels_per_class: needs the class"):
        config(labeled={"labels_per_class": 4}, task={"name": "multilabel"})
    with pytest.raises(ConfigError, match=r"threshold is only used with name: multilabel"):
        config(task={"name": "regression", "threshold": 0.3})
    with pytest.raises(ConfigError, match=r"task.name: no task is called 'ranking'; known: cl"):
        config(task={"name": "ranking"})
    with pytest.raises(ConfigError, match=r"labels is only used with name: multilabel"):
        config(task={"labels": "ids"})
    assert config(labeled={"rows": 4}, task={"name": "regression"}).task.name == "regression"
