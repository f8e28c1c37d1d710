"""Which rows of a measured set are worth a look, on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpdist.data.batch import LabeledBatch
from hpdist.evaluate.row_outcomes import RowOutcomes, choose_rows, chosen_rows
from hpdist.tasks.base import Task
from hpdist.tasks.classification import Classification
from hpdist.tasks.multilabel import Multilabel
from hpdist.tasks.regression import Regression
from hpdist.tasks.row_choices import IN_ALL, OF_A_CLASS, Array, OutcomeTable

NAMES = ("cat", "dog", "owl")
DISAGREE = "Teacher and student disagree"
WRONG = "The teacher is wrong, the most confident first"


def made_up(rows: int = 300, classes: int = 3, seed: int = 0) -> OutcomeTable:
    draws = np.random.default_rng(seed)
    labels, teacher, student = draws.integers(0, classes, (3, rows))
    confidence = draws.integers(1, 20, rows).astype(np.float32) / 20  # with many ties
    kept = [np.stack([of, confidence], axis=1).astype(np.float32) for of in (teacher, student)]
    return OutcomeTable(draws.permutation(rows), labels[:, None], *kept)


def numbers(rows: int = 300, columns: int = 3) -> OutcomeTable:
    """Labels of 0 and 1, and numbers from 0 to 1, with many ties."""
    draws = np.random.default_rng(1)
    teacher, student = (draws.integers(0, 21, (rows, columns)).astype(np.float32) / 20
                        for _ in range(2))  # fmt: skip
    labels = draws.integers(0, 2, (rows, columns)).astype(np.float32)
    return OutcomeTable(draws.permutation(rows), labels, teacher, student)


def groups_of(task: Task, table: OutcomeTable) -> dict[str, Array]:
    return {choice.title: places for choice, places in choose_rows(task, table, NAMES)}


def test_groups_hold_what_they_say() -> None:
    table = made_up()
    groups = groups_of(Classification(), table)
    assert list(groups)[-2:] == [DISAGREE, WRONG]
    confidence = table.teacher[:, 1]
    for number, name in enumerate(NAMES):
        own = np.flatnonzero(table.labels[:, 0] == number)
        sure, unsure = (groups[f"{kind} confident: class {name}"] for kind in ("Most", "Least"))
        assert len(sure) == len(unsure) == OF_A_CLASS
        assert set(sure) | set(unsure) <= set(own)
        rest = np.setdiff1d(own, sure)
        assert confidence[sure].min() >= confidence[rest].max()
        assert confidence[unsure].max() <= confidence[np.setdiff1d(own, unsure)].min()
    wrong, disagree = groups[WRONG], groups[DISAGREE]
    assert len(wrong) == len(disagree) == IN_ALL
    assert (table.teacher[wrong, 0] != table.labels[wrong, 0]).all()
    assert (table.teacher[disagree, 0] != table.student[disagree, 0]).all()
    assert (np.diff(confidence[wrong]) <= 0).all()


def test_labels_wrongly_given_and_not_given() -> None:
    table, task = numbers(), Multilabel(threshold=0.6)
    groups = groups_of(task, table)
    p, there = table.teacher[:, 1], table.labels[:, 1] == 1
    extra = groups["Wrongly given the label dog, the most confident first"]
    missed = groups["Wrongly not given the label dog, the least likely first"]
    assert len(extra) == len(missed) == OF_A_CLASS
    assert not there[extra].any()
    assert p[extra].min() == np.sort(p[~there])[-OF_A_CLASS] > 0.6
    assert there[missed].all()
    assert p[missed].max() == np.sort(p[there])[OF_A_CLASS - 1] < 0.6
    apart = groups[DISAGREE]
    said = [kept[apart] > 0.6 for kept in (table.teacher, table.student)]
    assert (said[0] != said[1]).any(axis=1).all()
    assert len(groups) == 2 * 3 + 1
    assert task.row_text(np.array([0.7, 0.6, 0.9]), NAMES) == "cat, owl"
    assert task.row_text(np.zeros(3), NAMES) == "none"
    right = OutcomeTable(table.ids, table.labels, table.labels, table.labels)
    assert groups_of(task, right) == {}


def test_largest_errors_and_differences() -> None:
    table, task = numbers(columns=2), Regression(std=(2.0, 10.0), mean=(1.0, -5.0))
    groups = groups_of(task, table)
    errors = np.square(table.teacher - table.labels).sum(axis=1)
    apart = np.square(table.teacher - table.student).sum(axis=1)
    for title, distances in (
        ("Largest errors of the teacher", errors),
        ("Largest differences of teacher and student", apart),
    ):
        shown = distances[groups[title]]
        np.testing.assert_array_equal(shown, np.sort(distances)[::-1][:IN_ALL])
    assert task.row_text(np.array([0.5, -1.0], np.float32), NAMES) == "2, -15"
    many = Regression().row_text(np.arange(8.0), NAMES)
    assert many == "0, 1, 2, 3, 4, 5, … (8 numbers)"
    same = OutcomeTable(table.ids, table.labels, table.labels, table.labels)
    assert groups_of(task, same) == {}


@pytest.mark.parametrize(
    ("task", "table"),
    [(Classification(), made_up()), (Multilabel(), numbers()), (Regression(), numbers())],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_choose_together_what_one_would(task: Task, table: OutcomeTable, ranks: int) -> None:
    parts = [
        chosen_rows(task, table.take(own), NAMES)
        for own in np.array_split(np.arange(len(table.ids)), ranks)
    ]
    joined = OutcomeTable.join(parts)
    assert len(joined.ids) < len(table.ids)
    whole, found = (
        {title: one.ids[rows].tolist() for title, rows in groups_of(task, one).items()}
        for one in (table, joined)
    )
    assert found == whole


def test_groups_without_rows_are_left_out() -> None:
    kept = np.array([[0.0, 1.0]] * 2, np.float32)
    table = OutcomeTable(np.arange(2), np.zeros((2, 1), np.int64), kept, kept)
    expected = ["Most confident: class cat", "Least confident: class cat"]
    assert list(groups_of(Classification(), table)) == expected


def test_batches_are_collected_without_what_does_not_count() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    batch = LabeledBatch(torch.zeros(3, 1), torch.tensor([0, 0, 1]), torch.tensor([7, 8, 9]))
    outcomes, valid = RowOutcomes(Classification()), torch.tensor([True, True, False])
    outcomes.add("student", batch, -logits, valid)
    alone = outcomes.table()
    assert alone.teacher[:, 0].tolist() == alone.student[:, 0].tolist() == [1, 0]
    outcomes.add("teacher", batch, logits, valid)
    table = outcomes.table()
    assert table.ids.tolist() == [7, 8]
    assert table.labels.tolist() == [[0], [0]]
    assert table.teacher[:, 0].tolist() == [0, 1]
    assert table.student[:, 0].tolist() == [1, 0]
    assert table.teacher[:, 1] == pytest.approx(torch.sigmoid(torch.tensor([2.0, 1.0])).numpy())


def test_a_task_that_says_nothing_of_rows_has_none() -> None:
    batch = LabeledBatch(torch.zeros(2, 1), torch.zeros(2, 3), torch.arange(2))
    outcomes, valid = RowOutcomes(Task()), torch.ones(2, dtype=torch.bool)
    outcomes.add("student", batch, torch.zeros(2, 3), valid)
    assert outcomes.is_empty
