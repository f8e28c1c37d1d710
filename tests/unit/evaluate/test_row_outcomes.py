"""Which rows of a measured set are worth a look, on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpdist.data.batch import LabeledBatch
from hpdist.evaluate.row_outcomes import (
    CONFIDENT,
    DISAGREE,
    IN_ALL,
    OF_A_CLASS,
    UNSURE,
    WRONG,
    OutcomeTable,
    RowOutcomes,
    choose_rows,
)


def made_up(rows: int = 300, classes: int = 3, seed: int = 0) -> OutcomeTable:
    draws = np.random.default_rng(seed)
    labels, teacher, student = draws.integers(0, classes, (3, rows))
    confidence = draws.integers(1, 20, rows).astype(np.float32) / 20  # with many ties
    return OutcomeTable(draws.permutation(rows), labels, teacher, student, confidence)


def test_groups_hold_what_they_say() -> None:
    table = made_up()
    groups = choose_rows(table, 3)
    assert list(groups)[-2:] == [(DISAGREE, None), (WRONG, None)]
    for number in range(3):
        own = np.flatnonzero(table.labels == number)
        sure, unsure = groups[CONFIDENT, number], groups[UNSURE, number]
        assert len(sure) == len(unsure) == OF_A_CLASS
        assert set(sure) | set(unsure) <= set(own)
        rest = np.setdiff1d(own, sure)
        assert table.confidence[sure].min() >= table.confidence[rest].max()
        assert table.confidence[unsure].max() <= table.confidence[np.setdiff1d(own, unsure)].min()
    wrong, disagree = groups[WRONG, None], groups[DISAGREE, None]
    assert len(wrong) == len(disagree) == IN_ALL
    assert (table.teacher[wrong] != table.labels[wrong]).all()
    assert (table.teacher[disagree] != table.student[disagree]).all()
    assert (np.diff(table.confidence[wrong]) <= 0).all()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_choose_together_what_one_would(ranks: int) -> None:
    table = made_up()
    parts = []
    for own in np.array_split(np.arange(len(table.ids)), ranks):
        part = table.take(own)
        kept = sorted({int(row) for rows in choose_rows(part, 3).values() for row in rows})
        parts.append(part.take(np.array(kept)))
    joined = OutcomeTable.join(parts)
    assert len(joined.ids) < len(table.ids)
    whole = {group: table.ids[rows].tolist() for group, rows in choose_rows(table, 3).items()}
    found = {group: joined.ids[rows].tolist() for group, rows in choose_rows(joined, 3).items()}
    assert found == whole


def test_groups_without_rows_are_left_out() -> None:
    one = np.zeros(2, np.int64)
    table = OutcomeTable(np.arange(2), one, one, one, np.ones(2, np.float32))
    assert list(choose_rows(table, 2)) == [(CONFIDENT, 0), (UNSURE, 0)]


def test_batches_are_collected_without_what_does_not_count() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    batch = LabeledBatch(torch.zeros(3, 1), torch.tensor([0, 0, 1]), torch.tensor([7, 8, 9]))
    outcomes, valid = RowOutcomes(), torch.tensor([True, True, False])
    outcomes.add("student", batch, -logits, valid)
    alone = outcomes.table()
    assert alone.teacher.tolist() == alone.student.tolist() == [1, 0]
    outcomes.add("teacher", batch, logits, valid)
    table = outcomes.table()
    assert table.ids.tolist() == [7, 8]
    assert table.labels.tolist() == [0, 0]
    assert table.teacher.tolist() == [0, 1]
    assert table.student.tolist() == [1, 0]
    assert table.confidence == pytest.approx(torch.sigmoid(torch.tensor([2.0, 1.0])).numpy())


def test_what_is_no_row_of_one_class_is_passed_over() -> None:
    batch = LabeledBatch(torch.zeros(2, 1), torch.zeros(2, 3), torch.arange(2))
    outcomes, valid = RowOutcomes(), torch.ones(2, dtype=torch.bool)
    outcomes.add("student", batch, torch.zeros(2, 3), valid)
    outcomes.add("student", batch, {"logits": torch.zeros(2, 3)}, valid)
    assert outcomes.is_empty
