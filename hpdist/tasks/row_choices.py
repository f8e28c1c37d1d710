"""Which rows of a measured set are worth a look: what a task says of it.

A task keeps a few numbers of every row's outputs (`row_outcome`), ranks the rows by them
(`row_choices`), and writes them out (`row_text`). The run collects them from all ranks, and its
report shows the rows that come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]

OF_A_CLASS = 4
"""Most rows of a class in a group."""
IN_ALL = 12
"""Most rows in a group of all classes, and most classes that have groups of their own."""


@dataclass(frozen=True)
class OutcomeTable:
    """What the models made of rows; every array is [rows] or [rows, *]."""

    ids: Array  # int64, the rows of the split
    labels: Array  # what `row_label` keeps
    teacher: Array  # what `row_outcome` keeps
    student: Array

    def take(self, rows: Array) -> OutcomeTable:
        """Give some of the rows."""
        return OutcomeTable(*(column[rows] for column in self.columns))

    @property
    def columns(self) -> tuple[Array, ...]:
        """The arrays, in the order of the fields."""
        return self.ids, self.labels, self.teacher, self.student

    @classmethod
    def join(cls, tables: Sequence[OutcomeTable]) -> OutcomeTable:
        """Put the rows of all ranks together."""
        parts = zip(*(table.columns for table in tables), strict=True)
        return cls(*(np.concatenate(part) for part in parts))


@dataclass(frozen=True)
class RowChoice:
    """Rows that have something in common, and which of them come first.

    A row's score must depend on that row alone: what is chosen of the rows that ranks have chosen
    is then what would be chosen of all.
    """

    title: str
    among: Array  # bool [rows]
    scores: Array  # [rows]; the rows with the largest are shown, in that order
    most: int
    """How many rows are shown at most."""
    confidence: Array | None = None  # [rows], the probability that is shown beside a row
    subject: str = ""
    """What that is the probability of, where it is not what the teacher predicts."""

    def places(self, ids: Array) -> Array:
        """Give the places of its rows in the table; among equal scores the smallest id is first."""
        order = np.lexsort((ids, -self.scores))
        return order[self.among[order]][: self.most]


class ShowsRows:
    """The part of a task that says which rows a report shows; by default none."""

    def row_outcome(self, outputs: Any) -> Tensor | None:
        """Give what is kept of each row's outputs, [rows, *] fp32; None to show no rows."""
        return None

    def row_label(self, labels: Any) -> Tensor:
        """Give what is kept of each row's label, [rows, *]; `row_text` must be able to write it."""
        kept: Tensor = labels
        return kept

    def row_choices(self, table: OutcomeTable, names: Sequence[str]) -> list[RowChoice]:
        """Say which rows are worth a look; `names` are those of the classes or targets."""
        return []

    def row_text(self, kept: Array, names: Sequence[str]) -> str:
        """Write what was kept of one row, [*], for a person."""
        return str(kept)


def disagreement(among: Array, scores: Array, confidence: Array | None = None) -> RowChoice:
    """Choose the rows in which teacher and student disagree."""
    title = "Teacher and student disagree"
    return RowChoice(title, among, scores, IN_ALL, confidence)
