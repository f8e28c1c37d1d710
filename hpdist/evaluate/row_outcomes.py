"""Collects what the models make of the rows of a measured set, for those that are worth a look.

outcomes = RowOutcomes(task)
evaluate_both(engine, teacher, views, batches, task, outcomes.add)
table = outcomes.table()                     # of this rank's rows
groups = choose_rows(task, table, names)     # which of them, by title
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hpdist.data.batch import LabeledBatch
from hpdist.tasks.base import Task
from hpdist.tasks.row_choices import Array, OutcomeTable, RowChoice

Who: TypeAlias = Literal["teacher", "student"]


class RowOutcomes:
    """Collects what student and teacher make of this rank's rows during an evaluation."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._found: dict[Who, list[tuple[Tensor, ...]]] = {"teacher": [], "student": []}

    def add(self, who: Who, batch: LabeledBatch[Any, Any], outputs: Any, valid: Tensor) -> None:
        """Take a batch: the task's outputs of it, and which of its rows count, bool [batch].

        Outputs of a task that says of no row that it is worth a look are passed over.
        """
        kept = self._task.row_outcome(outputs)
        if kept is None:
            return
        assert batch.ids is not None
        columns = (batch.ids, self._task.row_label(batch.labels), kept)
        self._found[who].append(tuple(column.cpu()[valid.cpu()] for column in columns))

    @property
    def is_empty(self) -> bool:
        """Whether no batch was collected."""
        return not self._found["student"]

    def table(self) -> OutcomeTable:
        """Give what was collected; without a teacher the student stands for it."""
        student = self._joined("student")
        ids, labels, kept = self._joined("teacher") if self._found["teacher"] else student
        return OutcomeTable(ids, labels, kept, student[2])

    def _joined(self, who: Who) -> list[Array]:
        return [torch.cat(parts).numpy() for parts in zip(*self._found[who], strict=True)]


def choose_rows(
    task: Task, table: OutcomeTable, names: Sequence[str]
) -> list[tuple[RowChoice, Array]]:
    """Choose the rows of every group, as places in the table; groups without rows are left out.

    What is chosen of chosen rows of several ranks is what would be chosen of all rows.
    """
    choices = [(choice, choice.places(table.ids)) for choice in task.row_choices(table, names)]
    return [(choice, places) for choice, places in choices if len(places)]


def chosen_rows(task: Task, table: OutcomeTable, names: Sequence[str]) -> OutcomeTable:
    """Give the part of a table that any group may have."""
    chosen = choose_rows(task, table, names)
    kept = sorted({int(row) for _, places in chosen for row in places})
    return table.take(np.array(kept, np.int64))
