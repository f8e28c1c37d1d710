"""Evaluates the held-out sets of a run, for its records and its summary only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from hpdist.data.batch import LabeledBatch
from hpdist.data.sources.labeled import LabeledRows
from hpdist.distributed.collectives import world_size
from hpdist.evaluate.row_outcomes import RowOutcomes
from hpdist.evaluate.scoring import Evaluation, evaluate_both
from hpdist.messages.progress import Work, working
from hpdist.train.data import RunData
from hpdist.train.row_examples import gather_outcomes, make_examples
from hpdist.train.run_log import RunLog
from hpdist.train.state import RunState
from hpdist.train.step import SemiSupervisedStep

_Batch: TypeAlias = tuple[LabeledBatch, Tensor]


class Measuring:
    """The evaluation of a run, and its latest result.

    Args:
        step: Of the run; its student and its teacher are evaluated.
        data: Of the run; during the training its validation set is used, else its test set.
        state: Of the run, which keeps the best score on the validation set.
    """

    def __init__(self, step: SemiSupervisedStep, data: RunData, state: RunState) -> None:
        self._step = step
        self._data = data
        self._state = state
        self._latest: tuple[str, int, Evaluation] | None = None  # set and step
        self.name = "validation" if data.validation else "test"
        self.rows = data.validation or data.test
        """The set for evaluations during the training, if there is one."""
        self._outcomes: RowOutcomes | None = None  # of the rows that the report shows some of

    def evaluate(self, rows: LabeledRows, observe: Any = None) -> Evaluation:
        """Evaluate teacher and student on all rows of a set. Collective.

        `observe` is that of `evaluate_both`.
        """
        step, data = self._step, self._data
        passes = 1 if step.teacher is None else 2
        with working(f"evaluating {rows.name}", passes * len(rows), "rows") as work:
            batches = partial(_counted, partial(data.evaluation_batches, rows), work)
            return evaluate_both(step.engine, step.teacher, data.views, batches, data.task, observe)

    def _observer(self, rows: LabeledRows) -> Any:
        """Collect the outcomes of rows, in the last evaluation of the set that the report shows."""
        data = self._data
        if not data.config.log.examples or rows is not (data.test or data.validation):
            return None
        if self._step.applied_steps < data.config.steps:
            return None
        self._outcomes = RowOutcomes(data.task)
        return self._outcomes.add

    def write_examples(self, log: RunLog) -> None:
        """Write the rows that are worth a look, if the last evaluation found any. Collective."""
        data, outcomes = self._data, self._outcomes
        rows = data.test or data.validation
        if outcomes is None or outcomes.is_empty or rows is None:
            return
        task, name = data.task, "test" if data.test else "validation"
        table = gather_outcomes(task, outcomes, rows.classes.names)
        if table is None:
            return
        log.row_examples(lambda: make_examples(name, task, table, rows, data.spec, data.views))

    def measure(self, log: RunLog) -> dict[str, float]:
        """Evaluate during the training, for the record of this step. Collective."""
        rows, done = self.rows, self._step.applied_steps
        if rows is None:
            return {}
        start = time.monotonic()
        measured = self.evaluate(rows, self._observer(rows))
        log.leave_out(time.monotonic() - start)
        self._latest = (self.name, done, measured)
        log.confusions(done, {self.name: partial(measured.confusion, rows.classes.names)})
        counts = _counts(rows, measured)
        found = {f"eval/{self.name}/{k}": v for k, v in {**measured.values, **counts}.items()}
        self.recall(found)
        return found

    def recall(self, record: Mapping[str, Any]) -> None:
        """Store a record's score on the validation set, if it has one."""
        score = record.get(f"eval/validation/{self._data.task.headline}")
        if score is not None:
            self._state.note_validation(score)

    def summary(self) -> tuple[dict[str, object], dict[str, Callable[[], dict[str, object]]]]:
        """Return the summary's scores of all sets, and what makes their confusion matrices.

        Collective; the matrices are made only where they are written.
        """
        summary: dict[str, object] = {}
        confusions: dict[str, Callable[[], dict[str, object]]] = {}
        for name, rows in (("test", self._data.test), ("validation", self._data.validation)):
            if rows is not None:
                latest = self._latest
                now = latest is not None and latest[:2] == (name, self._step.applied_steps)
                if latest and now:
                    measured = latest[2]
                else:
                    measured = self.evaluate(rows, self._observer(rows))
                summary |= measured.summary(name)
                summary |= {f"{name}/{k}": v for k, v in _counts(rows, measured).items()}
                confusions[name] = partial(measured.confusion, rows.classes.names)
        if self._state.best is not None:
            best = f"validation/best_{self._data.task.headline}"
            summary[best], summary["validation/best_step"] = self._state.best
        return summary, confusions


def _counted(batches: Callable[[], Iterator[_Batch]], work: Work) -> Iterator[_Batch]:
    """Batches of a rank, counted as those of all ranks, which are evaluated together."""
    for batch, valid in batches():
        yield batch, valid
        work.add(int(valid.sum()) * world_size())


def _counts(rows: LabeledRows, measured: Evaluation) -> dict[str, int]:
    """The number of rows in the scores, and of those that could not be read."""
    count = len(rows) if measured.rows is None else measured.rows
    return {"rows": count, "bad_rows": len(rows) - count}
