"""The loop around `SemiSupervisedStep`: data in, steps, records, checkpoints, evaluation.

Trainer("wide_resnet", "fixmatch", labeled=train, unlabeled=more, test=test, steps=10_000).fit()
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

import datasets
from torch import nn

from hpdist.algorithms.base import Algorithm
from hpdist.checkpoint import reader as checkpoint
from hpdist.data.random import reseed
from hpdist.data.sources.labeled import LabeledRows
from hpdist.distributed.collectives import agreed, from_main, gathered, raise_together, world_size
from hpdist.distributed.launcher_watch import LauncherWatch
from hpdist.distributed.next_run import fresh_accelerate
from hpdist.engines import launch
from hpdist.errors import ConfigError, HpdistError
from hpdist.evaluate.scoring import Evaluation
from hpdist.messages.progress import working
from hpdist.messages.redaction import redacted_errors
from hpdist.tracking.run_folder import RunFolder
from hpdist.train import config as configuration
from hpdist.train import opening
from hpdist.train.build import build_step
from hpdist.train.checks import divide_batch
from hpdist.train.claim import Claim
from hpdist.train.compose import compose, execution_request
from hpdist.train.config import RunConfig
from hpdist.train.data import Objects, RunData
from hpdist.train.generations import Generations
from hpdist.train.given import algorithm_given, model_given, rows_given
from hpdist.train.guard import RunGuard
from hpdist.train.measuring import Measuring
from hpdist.train.model import RunModel
from hpdist.train.optim import learning_rate
from hpdist.train.records import Records
from hpdist.train.recovery import Rollback
from hpdist.train.run_log import RunLog
from hpdist.train.run_name import with_fresh_name
from hpdist.train.saving import Saving
from hpdist.train.state import RunState
from hpdist.train.step import StepOutcome


class Trainer:
    """Trains a model from labelled and unlabelled rows, on however many ranks were launched.

    Args:
        model: A `torch.nn.Module`, or a name or the settings of the config's `model` section. A
            copy of a module trains; after `fit` the module has the student's trained weights.
        algorithm: An algorithm's name or settings, or an object such as `FixMatch(threshold=0.9)`.
        labeled: A `datasets` object, a `pandas.DataFrame` or a list of rows; a pair of such an
            object and settings such as `{"input": "picture"}`; a path; or settings of the
            config's section.
        unlabeled: Likewise.
        test: Likewise.
        validation: Likewise.
        settings: Any other section of the config by its name: `batch={"labeled": 64}`,
            `steps=1000`. With `run={"name": …}` the run goes on where its folder has one; without,
            it is a new one, `run-0001` or the next that is free.

    Raises ConfigError or DataError before training. Collective: every rank must construct it.
    """

    @redacted_errors()
    def __init__(
        self,
        model: nn.Module | str | Mapping[str, Any],
        algorithm: str | Mapping[str, Any] | Algorithm = "fixmatch",
        *,
        labeled: Any,
        unlabeled: Any = None,
        test: Any = None,
        validation: Any = None,
        **settings: Any,
    ) -> None:
        objects = Objects()
        sets = {"labeled": labeled, "unlabeled": unlabeled, "test": test, "validation": validation}
        given = {name: rows for name, rows in sets.items() if rows is not None}
        values = {
            "data": {name: rows_given(name, rows, objects) for name, rows in given.items()},
            "algorithm": algorithm_given(algorithm, objects),
            "model": model_given(model, objects),
            **settings,
        }
        self._build(configuration.parse(values), objects)

    @classmethod
    @redacted_errors()
    def from_config(cls, config: RunConfig, *, files: bool = True) -> Trainer:
        """Make the trainer of a config; without `files` it writes nothing. Collective."""
        trainer = cls.__new__(cls)
        trainer._build(config, Objects(), files)
        return trainer

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, files: bool = True) -> Trainer:
        """Make the trainer of nested settings, as a config file has them. Collective."""
        return cls.from_config(configuration.parse(settings), files=files)

    def _build(self, config: RunConfig, objects: Objects, files: bool = True) -> None:
        """Check and build everything, cheapest first."""
        self.files = files
        self._opened: RunLog | None = None
        self._closed = False
        self._run_id: str | None = None  # the tracker's
        self._seconds = 0.0  # trained before this process
        self._resumed: dict[str, Any] | None = None  # what the checkpoint says of the run
        self._summary: dict[str, Any] | None = None  # of a run that is done
        self._problem: HpdistError | None = None  # that this rank has with its next rows
        self._excess: HpdistError | None = None  # of bad rows, the same on every rank
        sharding = launch.resolve(execution_request(config))
        self.config = config = config.model_copy(update={"loss_scale": sharding.loss_scale})
        uses_unlabeled = compose(config).views.uses_unlabeled
        if uses_unlabeled and config.data.unlabeled is None:
            raise ConfigError(
                f"data.unlabeled is missing: algorithm {config.algorithm.name} learns from "
                "unlabelled rows"
            )
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        micro_batches = divide_batch(config, ranks, uses_unlabeled)
        self._global_rows = config.batch.labeled + (config.batch.unlabeled if uses_unlabeled else 0)
        micro_batch = self._global_rows // ranks // micro_batches
        self.sharding = launch.with_batch(sharding, micro_batch, micro_batches, ranks)
        with fresh_accelerate():
            self._assemble(objects, uses_unlabeled, micro_batches)

    def _assemble(self, objects: Objects, uses_unlabeled: bool, micro_batches: int) -> None:
        """Open folder and data, build model and step, and go on where the folder has a run."""
        config, files = self.config, self.files
        opening.say_run(config, self.sharding, uses_unlabeled, files=files)
        self.accelerator = launch.make_accelerator(self.sharding)
        self.main = self.accelerator.is_main_process
        opening.say_devices(self.main)
        if config.run.name is None and files:
            self.config = config = with_fresh_name(config, self.main)
        if not (self.main and sys.stderr.isatty()):
            datasets.disable_progress_bars()
        self.launcher = LauncherWatch(self.accelerator.process_index)
        self.folder = RunFolder(config.run.folder, self.main)
        self.claim = Claim(config, self.folder, files)
        with ExitStack() as stack:
            stack.callback(self._let_go)
            saved = self.claim.open()
            self.data = RunData(
                config, objects, self.folder, saved=saved, uses_unlabeled=uses_unlabeled
            )
            stack.callback(self.data.close)
            self._build_step(objects, micro_batches)
            checkpoints = self.folder.checkpoints if files else None
            self.saving = Saving(config.checkpoint, config.steps, self.state, checkpoints)
            self.writer = self.saving.writer
            self.rollback = Rollback(config.divergence, self.folder, self.state, self.saving)
            self.measuring = Measuring(self.step, self.data, self.state)
            self.records = Records(
                self.step, self.data, self.state, self.saving, self.sharding, self._global_rows
            )
            self._resume(saved)
            if self.files and self._summary is None:
                # Not before: a run that is refused must not forget what it had.
                agreed(self.data.record)
            stack.pop_all()  # all is well, and what is open stays so

    def _build_step(self, objects: Objects, micro_batches: int) -> None:
        config, data = self.config, self.data
        self._model = RunModel(config, data, self.sharding, objects.model, self.main)
        self.step, initial = build_step(
            config, objects, data, self.accelerator, self.sharding, micro_batches, self._model
        )
        self.generations = Generations(self.step, data, initial, config.steps)
        engine = self.step.engine
        data.start(engine.rank, engine.world_size, files=self.files)
        self.guard = RunGuard(engine.rank, config.watchdog.seconds, self.launcher)
        self.state = RunState(self.step, data, config)

    @redacted_errors()
    def fit(self) -> dict[str, object]:
        """Train to the configured number of steps, evaluate, write and return the summary.

        Of a run that has done all of them it gives the summary and changes nothing. Collective:
        every rank must call.
        """
        if self._summary is not None:
            self.claim.say_done(self.data.config, self._summary["steps"])
            self.close()
            self._model.give_back(self.step)
            return self._summary
        if self._closed:
            raise ConfigError(
                "this trainer is closed; make it anew, and it goes on from its checkpoint"
            )
        config, step = self.config, self.step
        self._opened = self._open_log(self.files)
        try:
            resumed = self._resumed is not None
            self.claim.begin(self.data.config, step.applied_steps if resumed else None)
            with self.guard:
                if self._resumed is not None:
                    self._catch_up(self._resumed)
                if step.applied_steps < config.steps:
                    self._first_rows()
                while step.applied_steps < config.steps:
                    if self.generations.due:
                        self._begin_generation()
                    self._train_step()
                self._summary = self._finish()
        except HpdistError as error:
            self.log.alert(type(error).__name__, str(error))
            raise
        finally:
            self.close()
        self._model.give_back(step)
        return self._summary

    def student_model(self) -> nn.Module:
        """Give a plain model with the student's weights, on the CPU, in fp32 and evaluation mode.

        It needs neither hpdist nor other ranks. Collective: every rank must call.
        """
        return self._model.student(self.step)

    def teacher_model(self) -> nn.Module:
        """Give such a model with the teacher's weights: what a run's scores are of. Collective."""
        return self._model.teacher(self.step)

    @property
    def log(self) -> RunLog:
        """Where the run's numbers go, while it trains."""
        assert self._opened is not None
        return self._opened

    @redacted_errors()
    def dry_run(self) -> StepOutcome:
        """Do one step and write nothing. Collective."""
        for outcome in self.trial_steps(1):
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in outcome.metrics.items())
            self.log.say(f"dry run: one step, {numbers}; nothing was written")
        return outcome

    def trial_steps(self, attempts: int) -> Iterator[StepOutcome]:
        """Attempt a step whenever one is asked for, and write nothing. Collective."""
        self._opened = self._open_log(files=False)
        try:
            self._first_rows()
            for _ in range(attempts):
                yield self._attempt(measure=True)
        finally:
            self.close()

    def _open_log(self, files: bool) -> RunLog:
        return RunLog(
            self.data.config,
            self.folder,
            done=self.step.applied_steps,
            seconds=self._seconds,
            run_id=self._run_id,
            files=files,
            sharding=self.sharding,
            classes=self.data.labeled.classes.names,
        )

    @working("reading the first rows")
    def _first_rows(self) -> None:
        """Wait for the first batches; where a rank has none, say so on all. Collective."""
        raise_together(self.data.look_ahead(self.guard.stopping))
        if any(gathered(self.guard.stopping())):
            self._stop_early()

    def _attempt(self, measure: bool) -> StepOutcome:
        """Read one global batch and do one step with it."""
        config, step = self.config, self.step
        reseed(config.run.seed, step.attempts, step.engine.rank)
        self.guard.beat(step.applied_steps, "reading rows")
        step.own_time.begin()
        labeled, unlabeled = self.data.next()
        self._problem = self.data.look_ahead(self.guard.stopping) or self.claim.lost()
        stop = self._problem is not None or self.guard.stopping()
        self.guard.beat(step.applied_steps, "training")
        if unlabeled is None:
            self.log.examples(self.data.views, self.data.spec, labeled, step.attempts)
        else:
            self.log.examples(self.data.views, self.data.unlabeled_spec, unlabeled, step.attempts)
        waits = self.records.waits(self.log) if measure else None
        outcome = step(
            labeled,
            unlabeled,
            lr=self._rate(),
            measure=measure,
            tell=waits,
            stop=stop,
            save=self.saving.asks(),
        )
        self._excess = self.data.account(
            unlabeled, step.attempts, outcome.applied, outcome.bad_rows
        )
        return outcome

    def _rate(self) -> float:
        """The learning rate of the next step."""
        config, generations = self.config, self.generations
        done = generations.within(self.step.applied_steps)
        return learning_rate(config.schedule, config.optim.lr, done, generations.steps)

    def _begin_generation(self) -> None:
        """Have the teacher label all rows, and a student begin anew. Collective."""
        done = self.step.applied_steps
        self.log.say(f"step {done}: the teacher labels all rows, and the student begins anew")
        start = time.monotonic()
        self.generations.begin(lambda: self.guard.beat(done, "labelling rows"))
        self.log.leave_out(time.monotonic() - start)

    def _train_step(self) -> StepOutcome:
        """One attempt at a step, and whatever is due after it."""
        config, step = self.config, self.step
        lr = self._rate()
        measure = _due(config.log.every, step.applied_steps + 1, config.steps)
        outcome = self._attempt(measure)
        self.state.overflows += outcome.overflowed
        self.log.count_step(step.applied_steps, outcome.overflow)
        stopping = self._excess is not None or (outcome.stop and step.applied_steps < config.steps)
        pending = None
        if outcome.applied:
            pending = self._close_step(outcome, lr, measure, stopping)
        if stopping:
            self._stop_early(pending)
        return outcome

    def _close_step(
        self, outcome: StepOutcome, lr: float, measure: bool, stopping: bool
    ) -> dict[str, Any] | None:
        """Record, save and evaluate a step, in this order: no evaluation may cost what was trained.

        An evaluation of a run that is stopping waits for the next start, and so does the record
        that it is part of, which comes back. Collective.
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
                self.save(pending)
            if pending is not None:
                self._evaluate(pending)
        return pending

    def _stop_early(self, pending: dict[str, Any] | None = None) -> NoReturn:
        """Save and raise what keeps a rank from going on, or asked it to stop. Collective."""
        raise_together(self.claim.lost())  # whoever has the folder now is let be
        if not self.saving.saved:
            self.save(pending)
        self.saving.finish()
        raise_together(self._excess or self._problem)
        raise self.guard.stopped(self.step.applied_steps)

    def _evaluate(self, record: dict[str, Any]) -> None:
        """Measure, and write what was measured with the record of this step. Collective.

        Where that fails, the run is saved before it ends.
        """
        done = self.step.applied_steps
        self.guard.beat(done, "evaluating")
        if done == self.config.steps:
            self.saving.finish()
        try:
            found = self.measuring.measure(self.log)
        except Exception as error:
            known = isinstance(error, HpdistError) and error.everywhere
            if known or world_size() == 1:  # else the other ranks do not know of it
                if not self.saving.saved:
                    self.save(record)
                self.saving.finish()
            raise
        self.log.write(done, self.step.attempts, {**record, **found})

    def _catch_up(self, facts: Mapping[str, Any]) -> None:
        """Do an evaluation that a checkpoint came before, unless it is on record. Collective."""
        pending, done = facts.get("pending"), self.step.applied_steps
        if pending is None:
            return
        found = from_main(lambda: self.folder.record_of(done))
        if found is not None:
            self.measuring.recall(found)
        elif self.measuring.rows is not None:
            self._evaluate(pending)
        elif pending:
            self.log.write(done, self.step.attempts, pending)

    @redacted_errors()
    def evaluate(self, rows: LabeledRows) -> Evaluation:
        """Measure teacher and student on all rows of a set. Collective."""
        return self.measuring.evaluate(rows)

    def _finish(self) -> dict[str, object]:
        step = self.step
        self.saving.finish()
        summary, confusions = self.measuring.summary()
        summary |= self.records.of_run(self.log.seconds)
        agreed(lambda: self.log.write_summary(step.applied_steps, summary, confusions))
        return summary

    @redacted_errors()
    def save(self, pending: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint. Every rank must call.

        Args:
            pending: The record of this step, where an evaluation that belongs to it comes later.
        """
        log = self._opened
        self.saving.save(
            {
                "seconds": self._seconds if log is None else log.seconds,
                "tracker_run_id": self._run_id if log is None else log.run_id,
                "pending": pending,
            }
        )

    def _resume(self, saved: checkpoint.SavedRun | None) -> None:
        """Continue from a checkpoint, or begin."""
        if saved is None:
            if self.files:
                agreed(lambda: self.folder.drop_metrics_after(-1))
                self.data.drop_audit_after(0)
            return
        facts = self._resumed = self.state.load(saved)
        self.saving.take_for_saved()
        self._seconds, self._run_id = facts["seconds"], facts["tracker_run_id"]
        self._summary = self.claim.summary(self.step.applied_steps)
        if self._summary is not None:
            return
        agreed(lambda: self.folder.drop_metrics_after(self.step.applied_steps))
        opening.say_resumed(saved.path, self.step.applied_steps, self.main)

    def close(self) -> None:
        """Stop the reading threads, and close tracker and console; any number of times.

        What is being written is finished, and the run folder is free for another run.
        """
        if self._closed:
            return
        self._closed = True
        self.data.close()
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            self.saving.close()
        if self._opened is not None:
            self._opened.close()
        self._let_go()

    def _let_go(self) -> None:
        """Give the run folder back, and watch the launcher no longer."""
        self.launcher.stop()
        self.claim.release()


def _due(every: int | None, step: int, last: int) -> bool:
    """Whether something due every so many steps is due now; at the last step everything is."""
    return step == last or (every is not None and step % every == 0)
