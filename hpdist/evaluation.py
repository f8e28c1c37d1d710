"""Scores of student and teacher over all ranks, exact at the ragged end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hpdist.algorithms.tasks import CLASSIFICATION, Task
from hpdist.data.batch import LabeledBatch
from hpdist.data.views.base import Views
from hpdist.distributed.ema import ShardedTeacher
from hpdist.distributed.engine import Engine
from hpdist.scores import AnyScores, Meter, Scores, make_meter

__all__ = ["Evaluation", "Scores", "evaluate", "evaluate_both"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of teacher and student; without a teacher it is the student twice."""

    teacher: AnyScores
    student: AnyScores

    @property
    def values(self) -> dict[str, float]:
        """The teacher's scores by name, and with `_student` the student's."""
        student = {f"{name}_student": value for name, value in self.student.values.items()}
        return self.teacher.values | student

    def summary(self, name: str) -> dict[str, float]:
        """Those that a run's summary has, under the set's name."""
        values, (first, *others) = self.values, self.teacher.summarized
        return {f"{name}/{key}": values[key] for key in (first, f"{first}_student", *others)}

    def confusion(self, classes: Sequence[str]) -> dict[str, object]:
        """Both confusion matrices, for JSON: a list for each class of how often it was taken as.

        Empty where the task has none.
        """
        if self.teacher.counts is None:
            return {}
        return {
            "classes": list(classes),
            "teacher": self.teacher.counts,
            "student": self.student.counts,
        }


def evaluate(
    engine: Engine,
    views: Views,
    batches: Iterable[tuple[LabeledBatch, Tensor]],
    task: Task = CLASSIFICATION,
) -> Any:
    """Scores of the weights that are in the model now; `Scores`, of classification.

    `batches` are this rank's, every one with a bool mask [batch] of the rows that count.
    Collective: every rank must give equally many, and one at least.
    """
    device = engine.device
    meter: Meter | None = None
    engine.module.eval()
    for batch, valid in batches:
        batch = batch.to(device, non_blocking=True)
        logits = engine.infer(views.plain(batch.inputs))
        if meter is None:
            meter = make_meter(task, logits.shape[-1], device)
        meter.add(logits, batch.labels, valid.to(device))
    assert meter is not None
    return meter.result()


def evaluate_both(
    engine: Engine,
    teacher: ShardedTeacher | None,
    views: Views,
    batches: Callable[[], Iterable[tuple[LabeledBatch, Tensor]]],
    task: Task = CLASSIFICATION,
) -> Evaluation:
    """Measure teacher and student.

    `batches` reads the set anew for each, so that no more than a batch is held. Collective.
    """
    student = evaluate(engine, views, batches(), task)
    if teacher is None:
        return Evaluation(student, student)
    with teacher.in_student():
        return Evaluation(evaluate(engine, views, batches(), task), student)
