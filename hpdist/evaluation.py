"""Scores of student and teacher from one confusion matrix of all ranks, exact at the ragged end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.data.batch import LabeledBatch
from hpdist.data.views.base import Views
from hpdist.distributed.ema import ShardedTeacher
from hpdist.distributed.engine import Engine
from hpdist.distributed.reduce import summed

_SUMMARIZED = ("accuracy", "accuracy_student", "macro_f1", "balanced_accuracy")


@dataclass(frozen=True)
class Scores:
    """How a set was predicted, over all ranks."""

    confusion: Tensor  # int64 [classes, classes] on the CPU: rows of a class, predicted as
    loss: float
    """Mean cross-entropy."""

    @property
    def values(self) -> dict[str, float]:
        """Accuracy, loss, macro-F1 and balanced accuracy.

        Macro-F1 is the mean F1 of the classes that are there or are predicted; balanced accuracy
        the mean recall of the classes that are there.
        """
        right = self.confusion.diagonal().double()
        there = self.confusion.sum(dim=1).double()
        predicted = self.confusion.sum(dim=0).double()
        both = there + predicted
        return {
            "accuracy": float(right.sum() / there.sum()),
            "loss": self.loss,
            "macro_f1": float((2 * right / both)[both > 0].mean()),
            "balanced_accuracy": float((right / there)[there > 0].mean()),
        }


@dataclass(frozen=True)
class Evaluation:
    """What was measured of teacher and student; without a teacher it is the student twice."""

    teacher: Scores
    student: Scores

    @property
    def values(self) -> dict[str, float]:
        """The teacher's scores by name, and with `_student` the student's."""
        student = {f"{name}_student": value for name, value in self.student.values.items()}
        return self.teacher.values | student

    def summary(self, name: str) -> dict[str, float]:
        """Those that a run's summary has, under the set's name."""
        values = self.values
        return {f"{name}/{key}": values[key] for key in _SUMMARIZED}

    def confusion(self, classes: Sequence[str]) -> dict[str, object]:
        """Both confusion matrices, for JSON: a list for each class of how often it was taken as."""
        return {
            "classes": list(classes),
            "teacher": self.teacher.confusion.tolist(),
            "student": self.student.confusion.tolist(),
        }


def evaluate(
    engine: Engine, views: Views, batches: Iterable[tuple[LabeledBatch, Tensor]]
) -> Scores:
    """Scores of the weights that are in the model now.

    `batches` are this rank's, every one with a bool mask [batch] of the rows that count.
    Collective: every rank must give equally many.
    """
    device = engine.device
    counts, classes = torch.zeros(0, dtype=torch.float64, device=device), 0
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    engine.module.eval()
    for batch, valid in batches:
        batch = batch.to(device, non_blocking=True)
        keep = valid.to(device).double()  # [batch]
        logits = engine.infer(views.plain(batch.inputs))
        if not classes:
            classes = logits.shape[-1]
            counts = counts.new_zeros(classes * classes)
        cells = batch.labels * classes + logits.argmax(dim=-1)  # [batch]
        counts.index_add_(0, cells, keep)
        loss += (F.cross_entropy(logits, batch.labels, reduction="none") * keep).sum()
    total = summed(torch.cat([counts, loss])).cpu()  # counts are exact up to 2^53
    confusion = total[:-1].long().view(classes, classes)
    return Scores(confusion, float(total[-1] / confusion.sum()))


def evaluate_both(
    engine: Engine,
    teacher: ShardedTeacher | None,
    views: Views,
    batches: Callable[[], Iterable[tuple[LabeledBatch, Tensor]]],
) -> Evaluation:
    """Measure teacher and student.

    `batches` reads the set anew for each, so that no more than a batch is held. Collective.
    """
    student = evaluate(engine, views, batches())
    if teacher is None:
        return Evaluation(student, student)
    with teacher.in_student():
        return Evaluation(evaluate(engine, views, batches()), student)
