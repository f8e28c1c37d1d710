"""The loop of a run around `SemiSupervisedStep`, and its recovery.

A step is attempted; then follows what is due (record, checkpoint, evaluation); a run that is asked
to stop is saved, and one that has diverged is rolled back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.random import reseed
from hpdist.distributed.collectives import (
    any_rank,
    call_on_all_ranks,
    raise_together,
    run_on_main,
    world_size,
)
from hpdist.errors import ConfigError, DataError, HpdistError
from hpdist.messages.progress import working
from hpdist.messages.redaction import redacted_errors
from hpdist.train.build import Run
from hpdist.train.optim import learning_rate
from hpdist.train.outcome import StepOutcome
from hpdist.train.run_log import RunLog


@dataclass(frozen=True)
class Attempt:
    """One attempt at a step, and the errors that keep the run from continuing."""

    outcome: StepOutcome
    problem: HpdistError | None
    """This rank's error, with the rows of the next step or with the run's folder."""
    excess: DataError | None
    """The error of too many unusable rows, the same on every rank."""


class RunLoop:
    """Trains a run whose parts are finished.

    Args:
        run: The parts.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config
        self.files = run.files
        self.sharding = run.sharding
        self.accelerator = run.accelerator
        self.main = run.main
        self.folder = run.folder
        self.claim = run.claim
        self.data = run.data
        self.step = run.step
        self.generations = run.generations
        self.guard = run.guard
        self.state = run.state
        self.saving = run.saving
        self.writer = run.saving.writer
        self.model_saving = run.model_saving
        self.rollback = run.rollback
        self.measuring = run.measuring
        self.records = run.records
        self._summary = dict(run.outset.summary)  # empty until all steps are done
        self._logs: list[RunLog] = []
        self._closing = ExitStack()  # closes the logs
        self._closed = False
        self._handed_back = False  # whether the given module has the trained weights

    @redacted_errors()
    def fit(self) -> dict[str, object]:
        """Train to the configured number of steps, evaluate, write and return the summary.

        A run that has done all of them, now or before, returns its summary and changes nothing.
        Collective: every rank must call. Raises ConfigError if the trainer was closed before.
        """
        if self._handed_back:
            return dict(self._summary)
        if self._summary:
            self.claim.log_done(self.data.config, self._summary["steps"])
            self._leave_model()
        else:
            self._fit()
        self._handed_back = True
        self.run.model.give_back(self.step)
        return dict(self._summary)

    def _leave_model(self) -> None:
        """Write the model of a run that is done, if it has none; close in any case. Collective."""
        try:
            self.model_saving.finish()
        finally:
            self.close()

    def _fit(self) -> None:
        """Train, and close in any case. Collective."""
        self._check_open()
        log = self._open_log(self.files)
        try:
            self._summary.update(self._train())
        except HpdistError as error:
            log.alert(type(error).__name__, str(error))
            raise
        finally:
            self.close()

    @redacted_errors()
    def save(self) -> None:
        """Begin to write a checkpoint of the run's present state. Every rank must call.

        Raises ConfigError if the trainer is closed and the run has advanced since it was saved.
        """
        if self._closed and self.saving.saved:
            return
        self._check_open()
        self._save()

    def close(self) -> None:
        """Stop the reading threads, and close tracker and console; may be called repeatedly.

        Pending writes are finished, and the run folder is released.
        """
        if self._closed:
            return
        self._closed = True
        self.data.close()
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            self.saving.close()
        self._closing.close()
        self.run.launcher.stop()
        self.claim.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(
                "this trainer is closed; make a new one, and it continues from its checkpoint"
            )

    @property
    def log(self) -> RunLog:
        """The log of the run's numbers, while it trains."""
        return self._logs[-1]

    def _open_log(self, files: bool) -> RunLog:
        outset = self.run.outset
        log = RunLog(
            self.data.config,
            self.folder,
            done=self.step.applied_steps,
            seconds=outset.seconds,
            run_id=outset.tracker_run_id,
            files=files,
            sharding=self.sharding,
            classes=self.data.labeled.classes.names,
        )
        self._logs.append(log)
        self._closing.callback(log.close)
        return log

    def _train(self) -> dict[str, object]:
        """Do all remaining steps; return the summary. Collective."""
        config, step, facts = self.config, self.step, self.run.outset.facts
        self.claim.begin(self.data.config, None if facts is None else step.applied_steps)
        with self.guard:
            if facts is not None:
                self._catch_up(facts)
            if step.applied_steps < config.steps:
                self._first_rows()
            while step.applied_steps < config.steps:
                if self.generations.due:
                    self._begin_generation()
                self._train_step()
            return self._finish()

    @working("reading the first rows")
    def _first_rows(self) -> None:
        """Wait for the first batches; if a rank has none, raise on all. Collective."""
        raise_together(self.data.prefetch(self.guard.stopping))
        if any_rank(self.guard.stopping()):
            self._stop_early()

    def _attempt(self, measure: bool) -> Attempt:
        """Read one global batch and attempt one step with it."""
        config, step = self.config, self.step
        reseed(config.run.seed, step.attempts, step.engine.rank)
        self.guard.heartbeat(step.applied_steps, "reading rows")
        step.rank_timer.begin()
        labeled, unlabeled = self.data.next()
        problem = self.data.prefetch(self.guard.stopping) or self.claim.lost()
        stop = problem is not None or self.guard.stopping()
        self.guard.heartbeat(step.applied_steps, "training")
        if unlabeled is None:
            self.log.examples(self.data.views, self.data.spec, labeled, step.attempts)
        else:
            self.log.examples(self.data.views, self.data.unlabeled_spec, unlabeled, step.attempts)
        outcome = step(
            labeled,
            unlabeled,
            lr=self._rate(),
            measure=measure,
            rank_metrics=self.records.waits(self.log) if measure else None,
            stop=stop,
            save=self.saving.asks(),
            following=None if stop else self._following,
        )
        excess = self.data.record_consumed(
            unlabeled, step.attempts, outcome.applied, outcome.bad_rows
        )
        return Attempt(outcome, problem, excess)

    def _following(self) -> tuple[LabeledBatch, UnlabeledBatch | None] | None:
        """Give the next attempt's batches if they are at hand, and seed what views draw from."""
        config, step = self.config, self.step
        if step.applied_steps + 1 >= config.steps:
            return None
        reseed(config.run.seed, step.attempts + 1, step.engine.rank)
        return self.data.following()

    def _rate(self) -> float:
        """The learning rate of the next step."""
        config, generations = self.config, self.generations
        done = generations.within(self.step.applied_steps)
        return learning_rate(config.schedule, config.optim.lr, done, generations.steps)

    def _begin_generation(self) -> None:
        """Have the teacher label all rows, and reset the student. Collective."""
        done = self.step.applied_steps
        self.log.log_line(f"step {done}: the teacher labels all rows, and the student is reset")
        start = time.monotonic()
        self.generations.begin(lambda: self.guard.heartbeat(done, "labelling rows"))
        self.log.leave_out(time.monotonic() - start)

    def _train_step(self) -> StepOutcome:
        """Attempt one step, and do whatever is due after it."""
        config, step = self.config, self.step
        lr = self._rate()
        measure = _due(config.log.every, step.applied_steps + 1, config.steps)
        attempt = self._attempt(measure)
        outcome, excess = attempt.outcome, attempt.excess
        self.state.overflows += outcome.overflowed
        self.log.count_step(step.applied_steps, outcome.overflow)
        stopping = excess is not None or (outcome.stop and step.applied_steps < config.steps)
        pending = None
        if outcome.applied:
            pending = self._close_step(outcome, lr, measure, stopping)
        if stopping:
            self._stop_early(pending, excess or attempt.problem)
        return outcome

    def _close_step(
        self, outcome: StepOutcome, lr: float, measure: bool, stopping: bool
    ) -> dict[str, Any] | None:
        """Record, save and evaluate a step, in this order: no evaluation may lose trained steps.

        If the run is stopping, an evaluation waits for the next start, and so does the record
        that it belongs to, which is restored. Collective.
        """
        config, done = self.config, self.step.applied_steps
        record = self.records.of_step(outcome, lr, self.log) if measure else {}
        wrong = self.rollback.look(record) if measure else None
        measured = self.measuring.rows is not None and _due(config.eval.every, done, config.steps)
        pending = record if measured and wrong is None else None
        if record and pending is None:
            self.log.write(done, self.step.attempts, record)
        if wrong is not None:
            self._catch_up(self.rollback.go_back(*wrong, self.log))
        elif not stopping:
            if self.saving.due(outcome.save):
                self._save(pending)
            if pending is not None:
                self._evaluate(pending)
        return pending

    def _stop_early(
        self, pending: dict[str, Any] | None = None, error: HpdistError | None = None
    ) -> NoReturn:
        """Save and raise what keeps a rank from continuing, or asked it to stop. Collective."""
        raise_together(self.claim.lost())  # the folder's new owner is left alone
        if not self.saving.saved:
            self._save(pending)
        self.saving.finish()
        raise_together(error)
        raise self.guard.stop_error(self.step.applied_steps)

    def _evaluate(self, record: dict[str, Any]) -> None:
        """Evaluate, and write the results with the record of this step. Collective.

        If that fails, the run is saved before it ends.
        """
        done = self.step.applied_steps
        self.guard.heartbeat(done, "evaluating")
        if done == self.config.steps:
            self.saving.finish()
        try:
            found = self.measuring.measure(self.log)
        except Exception as error:
            known = isinstance(error, HpdistError) and error.everywhere
            if known or world_size() == 1:  # else the other ranks do not know of the error
                if not self.saving.saved:
                    self._save(record)
                self.saving.finish()
            raise
        start = time.monotonic()
        self.guard.heartbeat(done, "writing the model")
        self.model_saving.keep_best()
        self.log.leave_out(time.monotonic() - start)
        self.log.write(done, self.step.attempts, {**record, **found})

    def _catch_up(self, facts: Mapping[str, Any]) -> None:
        """Do an evaluation that was due at a checkpoint, unless it is on record. Collective."""
        pending, done = facts.get("pending"), self.step.applied_steps
        if pending is None:
            return
        found = run_on_main(lambda: self.folder.record_of(done))
        if found is not None:
            self.measuring.recall(found)
        elif self.measuring.rows is not None:
            self._evaluate(pending)
        elif pending:
            self.log.write(done, self.step.attempts, pending)

    def _save(self, pending: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint. Every rank must call.

        Args:
            pending: The record of this step, if an evaluation that belongs to it follows.
        """
        outset = self.run.outset
        log = self._logs[-1] if self._logs else None
        self.saving.save(
            {
                "seconds": outset.seconds if log is None else log.seconds,
                "tracker_run_id": outset.tracker_run_id if log is None else log.run_id,
                "pending": pending,
            }
        )

    def _finish(self) -> dict[str, object]:
        """Evaluate, and write and return the summary. Collective."""
        step = self.step
        self.saving.finish()
        summary, confusions = self.measuring.summary()
        self.guard.heartbeat(step.applied_steps, "writing the model")
        self.model_saving.finish()
        summary |= self.records.of_run(run_on_main(lambda: self.log.seconds))  # alike on all ranks
        self.measuring.write_examples(self.log)
        call_on_all_ranks(lambda: self.log.write_summary(step.applied_steps, summary, confusions))
        return summary


def _due(every: int | None, step: int, last: int) -> bool:
    """Whether something with an interval of steps is due; at the last step everything is."""
    return step == last or (every is not None and step % every == 0)
