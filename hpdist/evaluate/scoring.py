"""Scores of student and teacher over all ranks, exact at the ragged end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor

from hpdist.aliases import find_moved
from hpdist.data.batch import LabeledBatch
from hpdist.data.structures import Structure, to
from hpdist.data.views.base import Views
from hpdist.distributed.collectives import reports, sums
from hpdist.engines.base import Engine
from hpdist.engines.teacher import ShardedTeacher
from hpdist.errors import DataError, HpdistError, describe
from hpdist.evaluate.row_outcomes import Who
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import Task
from hpdist.tasks.metrics import AnyScores, Meter, confused_pairs

__all__ = ["Evaluation", "EvaluationError", "evaluate", "evaluate_both", "evaluating", "together"]

T = TypeVar("T")
Observer: TypeAlias = Callable[[LabeledBatch, Any, Tensor], None]


class EvaluationError(HpdistError):
    """A set could not be measured; the weights are what they were."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of teacher and student; without a teacher it is the student twice."""

    teacher: AnyScores
    student: AnyScores
    rows: int | None = None
    """Rows of all ranks that the scores are over."""

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

        With many classes it has the most confused pairs instead; empty where the task has neither.
        Only the rank that writes it should call: it takes far more memory than the scores.
        """
        both = {"teacher": self.teacher, "student": self.student}
        if self.teacher.counts is not None:
            return {"classes": list(classes), **{who: s.counts for who, s in both.items()}}
        pairs = {who: confused_pairs(scores) for who, scores in both.items()}
        if pairs["teacher"] is None:
            return {}
        return {"classes": list(classes), "most_confused": pairs}


@contextmanager
def evaluating(
    engine: Engine, teacher: ShardedTeacher | None, views: Views
) -> Iterator[Callable[[Any], Any]]:
    """Give a function from inputs, as batches have them, to logits in fp32 of the model in eval.

    Of a task that goes by more than logits, to its outputs by name.

    The weights are the teacher's meanwhile, if one is given. Collective: every rank must enter, and
    under ZeRO-3 or FSDP2 call the function equally often.
    """
    training = engine.module.training

    def predict(inputs: Structure) -> Any:
        return engine.infer(views.plain(to(inputs, engine.device, non_blocking=True)))

    with nullcontext() if teacher is None else teacher.teacher_weights():
        engine.module.eval()
        try:
            yield predict
        finally:
            engine.module.train(training)


def evaluate(
    engine: Engine,
    views: Views,
    batches: Iterable[tuple[LabeledBatch, Tensor]],
    task: Task = DEFAULT_TASK,
) -> Any:
    """Give the scores of the weights that are in the model now, as the task has them.

    `batches` are this rank's, every one with a bool mask [batch] of the rows that count.
    Collective: every rank must give equally many, and one at least. Raises EvaluationError, on all
    ranks, where anything fails on one of them, and DataError where not one row counts.
    """
    return _measure(engine, views, batches, task)[0]


def _measure(
    engine: Engine,
    views: Views,
    batches: Iterable[tuple[LabeledBatch, Tensor]],
    task: Task,
    observe: Observer | None = None,
) -> tuple[AnyScores, int]:
    """The scores, and how many rows of all ranks they are over."""
    meter, rows = together(lambda: _go_through(engine, views, batches, task, observe))
    (count,) = sums([rows])
    if not count:
        error = DataError("not one row of the set that is measured on can be decoded")
        error.everywhere = True
        raise error
    return together(meter.result), count


def _go_through(
    engine: Engine,
    views: Views,
    batches: Iterable[tuple[LabeledBatch, Tensor]],
    task: Task,
    observe: Observer | None,
) -> tuple[Meter, int]:
    """Collect what this rank's scores are made of, and count its rows."""
    device = engine.device
    meter: Meter | None = None
    rows = 0
    engine.module.eval()
    for batch, valid in batches:
        batch = batch.to(device, non_blocking=True)
        outputs = engine.infer(views.plain(batch.inputs))
        meter = meter or task.meter(outputs)
        meter.add(outputs, batch.labels, valid.to(device))
        if observe is not None:
            observe(batch, outputs, valid)
        rows += int(valid.sum())
    assert meter is not None
    return meter, rows


def together(function: Callable[[], T]) -> T:
    """Call a function on every rank; what it raises on any, such as a lack of memory, all raise.

    Collective. Where it communicates itself (a forward under ZeRO-3 or FSDP2, a metric of
    torchmetrics) and fails on some ranks alone, the others wait in it, until the launcher or the
    watchdog ends them.
    """
    result: T | None = None
    failure: HpdistError | None = None
    cause: Exception | None = None
    try:
        result = function()
    except HpdistError as error:
        failure = cause = error
    except Exception as error:  # a model's, a metric's or the device's own
        failure, cause = EvaluationError(describe(error)), error
    failures = reports(failure)
    if not failures:
        return cast(T, result)
    rank, first = next(iter(failures.items()))
    if isinstance(first, EvaluationError):
        first = EvaluationError(f"the evaluation failed on rank {rank}: {first}{_advice(first)}")
    first.everywhere = True
    raise first from cause


def _advice(error: EvaluationError) -> str:
    return "; try a smaller eval.batch" if "OutOfMemoryError" in str(error) else ""


def evaluate_both(
    engine: Engine,
    teacher: ShardedTeacher | None,
    views: Views,
    batches: Callable[[], Iterable[tuple[LabeledBatch, Tensor]]],
    task: Task = DEFAULT_TASK,
    observe: Callable[[Who, LabeledBatch, Any, Tensor], None] | None = None,
) -> Evaluation:
    """Measure teacher and student.

    `batches` reads the set anew for each, so that no more than a batch is held. `observe` is given
    who predicts, each batch, its outputs and which of its rows count. Collective; raises as
    `evaluate` does.
    """

    def measured(who: Who) -> tuple[AnyScores, int]:
        own = None if observe is None else partial(observe, who)
        return _measure(engine, views, batches(), task, own)

    student, rows = measured("student")
    if teacher is None:
        return Evaluation(student, student, rows)
    with teacher.teacher_weights():
        return Evaluation(measured("teacher")[0], student, rows)


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
