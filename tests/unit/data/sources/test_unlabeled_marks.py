"""Rows that a table marks as having no label are passed over, counted and said."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.errors import DataError
from hpdist.tasks import DEFAULT_TASK, make_task
from hpdist.tasks.base import Task
from tests.support.labeled import open_labeled

NAN = float("nan")
DAYS = [dt.date(2024, 1, day) for day in (1, 2, 3)]
REGRESSION, MULTILABEL = make_task(name="regression"), make_task(name="multilabel")


def table(labels: list[Any], feature: Any = None) -> datasets.Dataset:
    rows = {"x": [[float(row), 1.0] for row in range(len(labels))], "label": labels}
    if feature is None:
        return datasets.Dataset.from_dict(rows)
    features = Features({"x": List(Value("float64")), "label": feature})
    return datasets.Dataset.from_dict(rows, features=features)


def opened(data: datasets.Dataset, task: Task | None = None, **settings: Any) -> LabeledRows:
    return open_labeled(
        Labeled(path="m", input="x", **settings), 0, dataset=data, labels=task or DEFAULT_TASK
    )


def held_out(data: datasets.Dataset, like: LabeledRows) -> LabeledRows:
    return open_test(LabelColumn(path="m", input="x"), like, input_spec(like), dataset=data)


MARKED: dict[str, tuple[list[Any], Any, str]] = {
    "minus one": ([-1, 0, 1, -1, 2], None, "-1"),
    "null": ([None, 0, 1, None, 2], None, "null"),
    "NaN": ([NAN, 0.0, 1.0, NAN, 2.0], None, "null"),
    "minus one beside NaN": ([-1.0, 0.0, 1.0, NAN, 2.0], None, "-1, null"),
    "empty text": (["", "a", "b", "  ", "c"], None, "an empty text"),
    "null beside text": ([None, "a", "b", "", "c"], None, "null, an empty text"),
    "ClassLabel": ([-1, 0, 1, None, 2], ClassLabel(names=["a", "b", "c"]), "-1, null"),
    "decimals": ([*map(Decimal, (-1, 0, 1)), None, Decimal(2)], None, "-1, null"),
    "minus one among names": (["-1", "a", "b", None, "c"], None, "-1, null"),
    "bytes": ([b"-1", b"a", b"b", b"", b"c"], None, "-1, an empty text"),
    "dates": ([None, DAYS[0], DAYS[1], None, DAYS[2]], None, "null"),
}


@pytest.mark.parametrize("kind", MARKED)
def test_marked_rows_are_passed_over_and_said(kind: str) -> None:
    labels, feature, marks = MARKED[kind]
    data = table(labels, feature)
    rows = opened(data)
    assert len(rows.classes) == 3
    assert (rows.chosen, rows.labels.tolist()) == ([1, 2, 4], [0, 1, 2])
    (note,) = rows.notes
    assert note.startswith("data.labeled: 3 of 5 rows have a label in column 'label'; the others (")
    assert f"({marks}; the first is row 0)" in note
    assert ("where -1 is a class" in note) == ("-1" in marks)
    assert opened(data, labels_per_class=1).chosen == [1, 2, 4]
    assert opened(data, rows=3).chosen == [1, 2, 4]
    assert opened(data, indices=[4, 1]).labels.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"data.labeled.rows: 4 asked for, .* has 3 with a label"):
        opened(data, rows=4)
    with pytest.raises(DataError, match=r"row 3 has the label .* data.labeled.indices names it"):
        opened(data, indices=[1, 3])
    test = held_out(data, rows)
    assert (test.ids.tolist(), test.labels.tolist()) == ([1, 2, 4], [0, 1, 2])
    assert test.notes[0].startswith("data.test: 3 of 5 rows have a label")


@pytest.mark.parametrize("blank", ["", "NaN", "null"])
def test_integers_with_blanks_in_csv(tmp_path: Path, blank: str) -> None:
    lines = ["a,b,label", "1,2,7", f"3,4,{blank}", "5,6,12", f"7,8,{blank}"]
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n")
    files = str(tmp_path / "l.csv")
    rows = open_labeled(Labeled(path="csv", data_files=files, input=["a", "b"]), 0)
    assert rows.classes.names == ("7", "12")
    assert rows.chosen == [0, 2]
    assert "2 of 4 rows have a label" in rows.notes[0]


def test_minus_one_is_a_class_where_it_cannot_be_a_mark() -> None:
    assert opened(table([-1, 0, -2, 5])).classes.names == ("-2", "-1", "0", "5")
    two = opened(table([1, -1, 1]))
    assert (two.classes.names, two.labels.tolist()) == (("-1", "1"), [1, 0, 1])
    assert two.notes == (
        "note: data.labeled: -1 and 1 are the only labels, so -1 is taken for a class; a row "
        "without a label has null there",
    )
    assert held_out(table([-1, 1]), two).labels.tolist() == [0, 1]
    assert opened(table(["-1", "0", "1"])).classes.names == ("-1", "0", "1")


def test_a_set_without_any_label_is_refused() -> None:
    rows = opened(table([0, 1, 2]))
    with pytest.raises(DataError, match=r"data.test.*no row has a label .* all 2 .* \(-1\)"):
        held_out(table([-1, -1]), rows)
    for labels in ([None, None], [-1, -1], ["", None], [NAN]):
        with pytest.raises(DataError, match=r"data.labeled.*no row has a label in column 'label'"):
            opened(table(labels))
    with pytest.raises(DataError, match="no row has a label"):
        opened(table([[None], None], List(Value("float64"))), REGRESSION)


def test_a_held_out_set_may_mark_rows_that_the_labelled_one_does_not() -> None:
    rows = opened(table([0, 1, 2]))
    assert held_out(table([2, -1, None, 0]), rows).ids.tolist() == [0, 3]
    texts = opened(table(["0", "1"]))
    assert held_out(table([1, -1, 0]), texts).labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="row 1 has the label -2"):
        held_out(table([2, -2, 0]), rows)


def test_lists_and_numbers() -> None:
    several = opened(table([["a"], None, [], ["b"]]), MULTILABEL)
    assert several.chosen == [0, 2, 3]
    assert several.labels.tolist() == [[1, 0], [0, 0], [0, 1]]
    assert "3 of 4 rows have a label" in several.notes[0]
    with pytest.raises(DataError, match=r"row 2 .*: -1 is none of the 2 classes \(0, 1\)"):
        opened(table([[0], [1], [0, -1]]), MULTILABEL)
    numbers = opened(table([1.0, None, NAN, 3.0]), REGRESSION)
    assert (numbers.chosen, numbers.labels.tolist()) == ([0, 3], [[-1], [1]])
    pairs = opened(table([[NAN, None], [1.0, 2.0], None, [3.0, 4.0]]), REGRESSION)
    assert pairs.chosen == [1, 3]
    assert opened(table([-1.0, 1.0]), REGRESSION).chosen == [0, 1]  # a number like any other
    with pytest.raises(DataError, match=r"row 1 .* it holds nulls"):
        opened(table([[1.0, 2.0], [1.0, None]]), REGRESSION)
    decimals = opened(table([Decimal("1.5"), None, Decimal("2.5")]), REGRESSION)
    assert decimals.labels.tolist() == [[-1], [1]]


MIXED: dict[str, tuple[list[Any], tuple[str, ...], str]] = {
    "integers": (["", 5, 7, "-1"], ("5", "7"), "null, -1"),
    "floats": (["", 1.5, 7, -1], (), "no whole number"),
    "booleans": ([-1, True, False, ""], ("False", "True"), "null"),
    "texts": ([None, "a", 7, -1], ("7", "a"), "null, '-1'"),
    "objects": ([None, {"a": 1}, 7, -1], (), "Json"),
}


@pytest.mark.parametrize("kind", MIXED)
def test_marks_of_another_type_in_json(kind: str, tmp_path: Path) -> None:
    labels, classes, told = MIXED[kind]
    lines = [json.dumps({"x": [1.0, 2.0], "label": label}) for label in labels]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = Labeled(path=str(tmp_path / "rows.jsonl"), input="x")
    if not classes:
        with pytest.raises(DataError, match=told):
            open_labeled(config, 0)
        return
    rows = open_labeled(config, 0)
    assert rows.classes.names[-2:] == classes
    assert rows.chosen[:2] == [1, 2]
    assert all(mark in "".join(rows.notes) for mark in told.split(", "))


def test_lists_of_marks() -> None:
    for labels, choice in (
        ([[None, None], [0, 1], [1, 1]], "vector"),
        ([[-1, -1], [0, 1], [1, 1]], "auto"),
        ([[-1], [0, 1], [1]], "ids"),
        ([[None], ["a", "b"], ["b"]], "auto"),
        ([[-1, -1], [0.0, 1.0], [1.0, 1.0]], "auto"),
    ):
        task = make_task(name="multilabel", labels=choice)
        rows = opened(table(labels), task=task)
        assert (rows.chosen, len(rows.classes)) == ([1, 2], 2)
        assert "1 of 3" not in rows.notes[0]
        assert "2 of 3 rows" in rows.notes[0]
    with pytest.raises(DataError, match=r"row 0 has the label \[-1, 1\]"):
        opened(table([[-1, 1], [0, 1], [1, 1]]), task=make_task(name="multilabel", labels="vector"))


def test_draws_among_all_rows_are_those_of_before() -> None:
    generator = np.random.default_rng([0, 0xC401CE])
    expected = sorted(generator.choice(40, 7, replace=False).tolist())
    assert opened(table([row % 3 for row in range(40)]), rows=7).chosen == expected


def test_a_draw_of_rows_takes_labelled_ones_alone() -> None:
    labels = [row % 3 if row % 5 == 0 else None for row in range(100)]
    for choice in ({"rows": 12}, {"labels_per_class": 4}):
        chosen = opened(table(labels), **choice).chosen
        assert len(chosen) == 12
        assert all(row % 5 == 0 for row in chosen)


def test_a_resumed_choice_of_rows_must_have_labels() -> None:
    data = table([0, 1, None])
    with pytest.raises(DataError, match=r"row 2 .* the recorded choice of rows names"):
        open_labeled(Labeled(path="m", input="x"), 0, dataset=data, chosen=[0, 2])
