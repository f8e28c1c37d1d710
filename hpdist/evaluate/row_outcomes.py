"""Which rows of a measured set are worth a look: sure and unsure ones, disagreements, mistakes.

outcomes = RowOutcomes()
evaluate_both(engine, teacher, views, batches, task, outcomes.add)
table = outcomes.table()                     # of this rank's rows
groups = choose_rows(table, classes=10)      # which of them, by group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpdist.data.batch import LabeledBatch

Array: TypeAlias = npt.NDArray[Any]
Who: TypeAlias = Literal["teacher", "student"]
Group: TypeAlias = tuple[str, int | None]
"""What its rows have in common, and their class where they are of one."""

CONFIDENT, UNSURE, DISAGREE, WRONG = "confident", "unsure", "disagree", "wrong"
OF_A_CLASS = 4
"""Most rows of a class in a group."""
IN_ALL = 12
"""Most rows in a group of all classes, and most classes that have groups of their own."""


@dataclass(frozen=True)
class OutcomeTable:
    """What the models made of rows of one class each; every array is [rows]."""

    ids: Array  # int64, the rows of the split
    labels: Array  # int64
    teacher: Array  # int64, the likeliest class
    student: Array  # int64
    confidence: Array  # float32, the teacher's probability of its class

    def take(self, rows: Array) -> OutcomeTable:
        """Give some of the rows."""
        return OutcomeTable(*(column[rows] for column in self.columns))

    @property
    def columns(self) -> tuple[Array, ...]:
        """The arrays, in the order of the fields."""
        return self.ids, self.labels, self.teacher, self.student, self.confidence

    @classmethod
    def join(cls, tables: Sequence[OutcomeTable]) -> OutcomeTable:
        """Put the rows of all ranks together."""
        parts = zip(*(table.columns for table in tables), strict=True)
        return cls(*(np.concatenate(part) for part in parts))


class RowOutcomes:
    """Collects what student and teacher make of this rank's rows during an evaluation."""

    def __init__(self) -> None:
        self._found: dict[Who, list[tuple[Tensor, ...]]] = {"teacher": [], "student": []}

    def add(self, who: Who, batch: LabeledBatch[Any, Any], outputs: Any, valid: Tensor) -> None:
        """Take a batch: logits [batch, classes], and which of its rows count, bool [batch].

        Outputs or labels of a task of one's own that are anything else are passed over.
        """
        labels = batch.labels
        if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)) or labels.dim() != 1:
            return
        confidence, classes = outputs.float().softmax(dim=-1).max(dim=-1)
        assert batch.ids is not None
        columns = (batch.ids, labels, classes, confidence)
        self._found[who].append(tuple(column.cpu()[valid.cpu()] for column in columns))

    @property
    def is_empty(self) -> bool:
        """Whether no batch was collected."""
        return not self._found["student"]

    def table(self) -> OutcomeTable:
        """Give what was collected; without a teacher the student stands for it."""
        student = self._joined("student")
        ids, labels, classes, confidence = (
            self._joined("teacher") if self._found["teacher"] else student
        )
        return OutcomeTable(ids, labels, classes, student[2], confidence)

    def _joined(self, who: Who) -> list[Array]:
        return [torch.cat(parts).numpy() for parts in zip(*self._found[who], strict=True)]


def choose_rows(table: OutcomeTable, classes: int) -> dict[Group, Array]:
    """Choose the rows of every group, as places in the table; groups without rows are left out.

    The teacher's most and least confident rows of each of the first classes; then the rows in which
    teacher and student disagree and those that the teacher gets wrong, the most confident first.
    What is chosen of chosen rows of several ranks is what would be chosen of all rows.
    """
    surest = np.lexsort((table.ids, -table.confidence))
    found: dict[Group, Array] = {}
    for number in range(min(classes, IN_ALL)):
        own = surest[table.labels[surest] == number]
        found[CONFIDENT, number] = own[:OF_A_CLASS]
        rest = np.lexsort((table.ids, table.confidence))
        found[UNSURE, number] = rest[table.labels[rest] == number][:OF_A_CLASS]
    found[DISAGREE, None] = surest[(table.teacher != table.student)[surest]][:IN_ALL]
    found[WRONG, None] = surest[(table.teacher != table.labels)[surest]][:IN_ALL]
    return {group: rows for group, rows in found.items() if len(rows)}
