"""Accuracy of student and teacher, over all ranks, exact at the ragged end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.data.batch import LabeledBatch
from hpdist.data.views.base import Views
from hpdist.distributed.ema import ShardedTeacher
from hpdist.distributed.engine import Engine
from hpdist.distributed.reduce import FusedSum


def evaluate(
    engine: Engine, views: Views, batches: Iterable[tuple[LabeledBatch, Tensor]]
) -> dict[str, float]:
    """Accuracy and mean cross-entropy of the weights that are in the model now.

    `batches` are this rank's, every one with a bool mask [batch] of the rows that count.
    Collective: every rank must give equally many.
    """
    device = engine.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # correct, loss, rows
    engine.module.eval()
    for batch, valid in batches:
        batch = batch.to(device, non_blocking=True)
        keep = valid.to(device).double()  # [batch]
        logits = engine.infer(views.plain(batch.inputs))
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        correct = logits.argmax(dim=-1) == batch.labels
        sums += torch.stack([(correct * keep).sum(), (losses * keep).sum(), keep.sum()])
    total = FusedSum({"sums": sums}).wait()["sums"]
    correct_rows, loss, rows = total.tolist()
    return {"accuracy": correct_rows / rows, "loss": loss / rows}


def evaluate_both(
    engine: Engine,
    teacher: ShardedTeacher | None,
    views: Views,
    batches: Callable[[], Iterable[tuple[LabeledBatch, Tensor]]],
) -> dict[str, float]:
    """`accuracy` and `loss` of the teacher, the same with `_student` of the student.

    `batches` reads the set anew for each, so that no more than a batch is held. Collective.
    """
    student = evaluate(engine, views, batches())
    averaged = student
    if teacher is not None:
        with teacher.in_student():
            averaged = evaluate(engine, views, batches())
    return averaged | {f"{name}_student": value for name, value in student.items()}
