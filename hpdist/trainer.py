"""The loop around `SemiSupervisedStep`: data in, steps, records, checkpoints, evaluation.

Trainer("wide_resnet", "fixmatch", labeled=train, unlabeled=more, test=test, steps=10_000).fit()
"""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import datasets
from torch import nn

from hpdist import config as configuration
from hpdist.algorithms.addon import compose
from hpdist.algorithms.base import Algorithm
from hpdist.checks import check_gradient, check_inputs, check_model, divide_batch
from hpdist.config import RunConfig
from hpdist.data.random import reseed
from hpdist.data.sources import LabeledRows
from hpdist.distributed import checkpoint, launch
from hpdist.distributed.batch_norm import batch_norms, global_batch_norm
from hpdist.distributed.checkpoint_writer import CheckpointWriter
from hpdist.distributed.engine import prepare
from hpdist.distributed.next_run import fresh_accelerate
from hpdist.distributed.reduce import agreed, from_main, largest, world_size
from hpdist.divergence import DivergenceMonitor
from hpdist.errors import ConfigError, DivergenceError, HpdistError
from hpdist.evaluation import Evaluation, evaluate_both
from hpdist.generations import Generations, initial_values
from hpdist.given import algorithm_given, check_classes, model_given, rows_given
from hpdist.models.build import build_model
from hpdist.models.full_precision import to_full_precision
from hpdist.models.heads import with_heads
from hpdist.models.memory import checkpoint_activations, peak_memory
from hpdist.models.stored import weights_as_stored
from hpdist.optim import build_optimizer, learning_rate
from hpdist.run_data import Objects, RunData
from hpdist.run_guard import RunGuard
from hpdist.run_state import RunState
from hpdist.step import SemiSupervisedStep, StepOutcome
from hpdist.tracking.console import Console
from hpdist.tracking.run_folder import RunFolder
from hpdist.tracking.run_log import RunLog


class Trainer:
    """Trains a model from labelled and unlabelled rows, on however many ranks were launched.

    Args:
        model: A `torch.nn.Module`, or a name or the settings of the config's `model` section.
        algorithm: An algorithm's name or settings, or an object such as `FixMatch(threshold=0.9)`.
        labeled: A `datasets` object, a `pandas.DataFrame` or a list of rows; a pair of such an
            object and settings such as `{"input": "picture"}`; a path; or settings of the
            config's section.
        unlabeled: Likewise.
        test: Likewise.
        validation: Likewise.
        settings: Any other section of the config by its name: `batch={"labeled": 64}`,
            `steps=1000`.

    Raises ConfigError or DataError before training. Collective: every rank must construct it.
    """

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
    def from_config(cls, config: RunConfig, *, files: bool = True) -> Trainer:
        """Make the trainer of a config; without `files` it writes nothing. Collective."""
        trainer = cls.__new__(cls)
        trainer._build(config, Objects(), files)
        return trainer

    def _build(self, config: RunConfig, objects: Objects, files: bool = True) -> None:
        """Check and build everything, cheapest first."""
        self.config = config
        self.files = files
        self._run_id: str | None = None  # the tracker's
        self._seconds = 0.0  # trained before this process
        self._latest: tuple[str, int, Evaluation] | None = None  # set and step
        self._saved_attempt = -1
        self._problem: HpdistError | None = None  # that this rank has with its next rows
        self._rollbacks = 0
        self.monitor = DivergenceMonitor(config.divergence)
        self._excess: HpdistError | None = None  # of bad rows, the same on every rank
        sharding = launch.resolve(config)
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
        self.sharding = launch.with_batch(sharding, micro_batch, micro_batches)
        with fresh_accelerate():
            self.accelerator = launch.make_accelerator(self.sharding)
            self.main = self.accelerator.is_main_process
            if not (self.main and sys.stderr.isatty()):
                datasets.disable_progress_bars()
            self.folder = RunFolder(config.run.folder, self.main)
            saved = self._open_folder()
            self.data = RunData(
                config, objects, self.folder, saved=saved, uses_unlabeled=uses_unlabeled
            )
            self._build_step(objects, micro_batches)
        if self.files:
            agreed(self.folder.create)
            engine, keep = self.step.engine, config.checkpoint.keep
            self.writer = CheckpointWriter(
                self.folder.checkpoints,
                engine.rank,
                engine.world_size,
                keep=keep,
                background=config.checkpoint.background,
            )
        self._resume(saved)
        if self.files:  # not before: a run that is refused must not forget what it had
            agreed(self.data.record)

    def _open_folder(self) -> checkpoint.SavedRun | None:
        """Find what to continue from, if anything. Collective."""
        if not self.files:
            return None
        if self.config.checkpoint.resume == "never":
            from_main(self.folder.refuse_unless_empty)
            return None
        return checkpoint.open_newest(self.folder.checkpoints, Console(0, 0, self.main).say)

    def _build_step(self, objects: Objects, micro_batches: int) -> None:
        config, accelerator = self.config, self.accelerator
        algorithm = self._make_algorithm(objects)
        check_inputs(algorithm, self.data.unlabeled_spec)
        model = self._make_model(objects, algorithm)
        initial = initial_values(model, algorithm.generations)
        if micro_batches > 1 and any(batch_norms(model)):
            Console(0, 0, self.main).say(
                f"note: BatchNorm sees one of {micro_batches} micro-batches at a time, so its "
                "statistics are not those of the global batch; norm: group avoids that"
            )
        optimizer = build_optimizer(model, config.optim)
        replicated = algorithm.views.teacher and self.sharding.stage == 3
        own = replace(objects, model=copy.deepcopy(objects.model)) if replicated else objects
        model, optimizer = prepare(accelerator, model, optimizer)
        # Not before: ZeRO-3 has by now let go of the first model's whole weights.
        replica = self._make_model(own, algorithm) if replicated else None
        self.step = SemiSupervisedStep(
            accelerator,
            model,
            optimizer,
            algorithm,
            self.data.views,
            micro_batches=micro_batches,
            decay=config.teacher.decay,
            teacher_warmup=config.teacher.warmup,
            grad_clip=self.sharding.grad_clip,
            precision=self.sharding.precision,
            loss_scale=config.loss_scale,
            teacher_model=replica,
            seed=config.run.seed,
            l1=config.optim.l1,
        )
        self.generations = Generations(self.step, self.data, initial, config.steps)
        engine = self.step.engine
        self.data.start(engine.rank, engine.world_size, files=self.files)
        self.guard = RunGuard(engine.rank, config.watchdog.seconds)
        self.state = RunState(self.step, self.data, config)

    def _make_algorithm(self, objects: Objects) -> Algorithm:
        """The algorithm with its add-ons, told how much data there is."""
        data = self.data
        check_classes(objects.algorithm, data.num_classes)
        algorithm = compose(self.config, data.num_classes, self.accelerator.device, data.task)
        algorithm.rows = data.unlabeled_rows
        algorithm.class_counts = data.class_counts
        return algorithm

    def _make_model(self, objects: Objects, algorithm: Algorithm) -> nn.Module:
        """Build the model, or take the one that was given; checked against the data."""
        config = self.config

        def build() -> nn.Module:
            model = objects.model
            if model is None:
                seed = config.run.seed
                model = build_model(config.model, self.data.spec, self.data.num_classes, seed)
            said = to_full_precision(model)
            if said is not None:
                Console(0, 0, self.main).say(said)
            model = global_batch_norm(model)
            example = self.data.views.plain(self.data.spec.example(2))
            trains = check_model(model, example, self.data.num_classes)
            model = with_heads(model, algorithm, example, getattr(config.model, "features", None))
            if not trains:
                check_gradient(model, example)
            if config.activation_checkpointing:
                checkpoint_activations(model)
            return model

        with weights_as_stored(self.sharding.stage == 3):
            model = agreed(build)
        if config.compile:
            model.compile()  # in place: the parameters keep their names
        return model

    def fit(self) -> dict[str, object]:
        """Train to the configured number of steps, evaluate, write and return the summary.

        Collective: every rank must call.
        """
        config, step = self.config, self.step
        self.log = self._open_log(self.files)
        try:
            if self.files:
                agreed(lambda: self.folder.write_text("config.yaml", self.data.config.to_yaml()))
            with self.guard:
                if step.applied_steps < config.steps:
                    self._first_rows()
                while step.applied_steps < config.steps:
                    if self.generations.due:
                        self._begin_generation()
                    self._train_step()
                summary = self._finish()
        except HpdistError as error:
            self.log.alert(type(error).__name__, str(error))
            raise
        finally:
            self.close()
        return summary

    def dry_run(self) -> StepOutcome:
        """Do one step and write nothing. Collective."""
        for outcome in self.trial_steps(1):
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in outcome.metrics.items())
            self.log.say(f"dry run: one step, {numbers}; nothing was written")
        return outcome

    def trial_steps(self, attempts: int) -> Iterator[StepOutcome]:
        """Attempt a step whenever one is asked for, and write nothing. Collective."""
        self.log = self._open_log(files=False)
        try:
            self._first_rows()
            for _ in range(attempts):
                yield self._attempt(measure=True)
        finally:
            self.close()

    def _open_log(self, files: bool) -> RunLog:
        return RunLog(
            self.config,
            self.folder,
            done=self.step.applied_steps,
            seconds=self._seconds,
            run_id=self._run_id,
            files=files,
            sharding=self.sharding,
        )

    def _first_rows(self) -> None:
        """Wait for the first batches; where a rank has none, say so on all. Collective."""
        problem = self.data.look_ahead()
        agreed(lambda: _raise(problem))

    def _attempt(self, measure: bool) -> StepOutcome:
        """Read one global batch and do one step with it."""
        config, step = self.config, self.step
        reseed(config.run.seed, step.attempts, step.engine.rank)
        self.guard.beat(step.applied_steps, "reading rows")
        step.own_time.begin()
        labeled, unlabeled = self.data.next()
        self._problem = self.data.look_ahead(self.guard.stopping)
        stop = self._problem is not None or self.guard.stopping()
        self.guard.beat(step.applied_steps, "training")
        waits = self._waits() if measure else None
        outcome = step(labeled, unlabeled, lr=self._rate(), measure=measure, tell=waits, stop=stop)
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
        if outcome.applied:
            done = step.applied_steps
            record = self._record(outcome, lr) if measure else {}
            if _due(config.eval.every, done, config.steps):
                record |= self._evaluate()
            if record:
                self.log.write(done, step.attempts, record)
            wrong = self.monitor.look(done, record) if measure else None
            if wrong is not None:
                self._go_back(*wrong)
            elif _due(config.checkpoint.every, done, config.steps):
                self.save()
        if self._excess is not None or (outcome.stop and step.applied_steps < config.steps):
            self._stop_early()
        return outcome

    def _stop_early(self) -> NoReturn:
        """Save and raise what keeps a rank from going on, or asked it to stop. Collective."""
        if self._saved_attempt != self.step.attempts:
            self.save()
        self._finish_saving()
        agreed(lambda: _raise(self._excess or self._problem))
        raise self.guard.stopped(self.step.applied_steps)

    def _go_back(self, first: int, what: str) -> None:
        """Go on from before a divergence that began at step `first`, or end. Collective."""
        config = self.config.divergence
        self.log.say(f"step {self.step.applied_steps}: {what}")
        self.log.alert("divergence", what)
        advice = "try a lower optim.lr, a higher threshold, or optim.grad_clip"
        if config.on == "stop" or not self.files:
            raise DivergenceError(
                f"{what}; {advice}; divergence.on: rollback goes on from a checkpoint before"
            )
        self._finish_saving()
        saved = checkpoint.open_newest(self.folder.checkpoints, self.log.say, before=first)
        if saved is None or self._rollbacks == config.most_rollbacks:
            why = f"after {self._rollbacks} rollbacks" if saved else "no checkpoint is from before"
            raise DivergenceError(f"{what}; {why}; {advice}")
        self._rollbacks += 1
        self.state.load(saved, data=False)
        self.monitor.forget()
        from_main(lambda: checkpoint.drop_after(self.folder.checkpoints, saved.facts["step"]))
        agreed(lambda: self.folder.drop_metrics_after(self.step.applied_steps))
        self.log.say(f"back to step {self.step.applied_steps}, and on with the rows that follow")

    def _waits(self) -> dict[str, float]:
        """Seconds since the last record that this rank has waited, by what for."""
        checkpoints = {"checkpoint_wait": self.writer.waited} if self.files else {}
        return self.log.since_record({"data_wait": self.data.waited, **checkpoints})

    def _record(self, outcome: StepOutcome, lr: float) -> dict[str, Any]:
        return {
            **outcome.metrics,
            **outcome.per_class,
            "loss_scale": outcome.new_scale,
            "overflows": self.state.overflows,
            "lr": lr,
            **({} if self.step.teacher is None else {"teacher_decay": self.step.teacher.decay_now}),
            "grad_norm": outcome.grad_norm if outcome.grad_norm is not None else 0.0,
            "epoch": self.data.epoch,
            "bad_rows": self.data.bad_rows,
            **self.log.speed(self._global_rows, outcome.per_rank),
        }

    def _evaluate(self) -> dict[str, float]:
        """Measure on the validation set, else report the test set; neither steers the training."""
        data = self.data
        self.guard.beat(self.step.applied_steps, "evaluating")
        name = "validation" if data.validation else "test"
        rows = data.validation or data.test
        if rows is None:
            return {}
        start = time.monotonic()
        measured = self.evaluate(rows)
        values = measured.values
        self.log.leave_out(time.monotonic() - start)
        self._latest = (name, self.step.applied_steps, measured)
        self.log.confusions(self.step.applied_steps, {name: measured.confusion(rows.classes.names)})
        if name == "validation":
            self.state.note_validation(values[data.task.headline])
        return {f"eval/{name}/{key}": value for key, value in values.items()}

    def evaluate(self, rows: LabeledRows) -> Evaluation:
        """Measure teacher and student on all rows of a set. Collective."""
        step, data = self.step, self.data
        batches = partial(data.evaluation_batches, rows)
        return evaluate_both(step.engine, step.teacher, data.views, batches, data.task)

    def _finish(self) -> dict[str, object]:
        step = self.step
        self._finish_saving()
        summary: dict[str, object] = {}
        confusions = {}
        for name, rows in (("test", self.data.test), ("validation", self.data.validation)):
            if rows is not None:
                latest = self._latest
                now = latest is not None and latest[:2] == (name, step.applied_steps)
                measured = latest[2] if latest and now else self.evaluate(rows)
                summary |= measured.summary(name)
                confusions[name] = measured.confusion(rows.classes.names)
        if self.state.best is not None:
            best = f"validation/best_{self.data.task.headline}"
            summary[best], summary["validation/best_step"] = self.state.best
        summary |= {
            "steps": step.applied_steps,
            "skipped_steps": step.attempts - step.applied_steps,
            "seconds": round(self.log.seconds, 3),
            "examples": step.attempts * self._global_rows,
            "world_size": world_size(),
            "precision": self.sharding.precision,
            "zero_stage": self.sharding.stage,
            "bad_rows": self.data.bad_rows,
            **self.data.duplicates.summary,
            "peak_memory_bytes": largest(peak_memory(step.engine.device)),
        }
        agreed(lambda: self.log.write_summary(step.applied_steps, summary, confusions))
        return summary

    def save(self) -> None:
        """Begin to write a checkpoint. Every rank must call."""
        if self.files:
            facts = {"seconds": self.log.seconds, "tracker_run_id": self.log.run_id}
            self._saved_attempt = self.step.attempts
            self.state.save(self.writer, facts)
            self._tell_problems()

    def _tell_problems(self) -> None:
        for problem in self.writer.problems():
            warnings.warn(
                f"{problem}; the training goes on, the checkpoints before are whole, and the next "
                "one is tried when it is due",
                stacklevel=2,
            )

    def _finish_saving(self) -> None:
        """Wait until the latest checkpoint is safe. Collective."""
        if self.files:
            self.writer.finish()

    def _resume(self, saved: checkpoint.SavedRun | None) -> None:
        """Continue from a checkpoint, or begin."""
        if saved is None:
            if self.files:
                agreed(lambda: self.folder.drop_metrics_after(-1))
                self.data.drop_audit_after(0)
            return
        facts = self.state.load(saved)
        self._seconds, self._run_id = facts["seconds"], facts["tracker_run_id"]
        agreed(lambda: self.folder.drop_metrics_after(self.step.applied_steps))
        Console(0, 0, self.main).say(
            f"continuing from {saved.path} at step {self.step.applied_steps}"
        )

    def close(self) -> None:
        """Stop the reading threads and close tracker and console."""
        self.data.close()
        self.log.close()


def _raise(error: HpdistError | None) -> None:
    if error is not None:
        raise error


def _due(every: int | None, step: int, last: int) -> bool:
    """Whether something due every so many steps is due now; at the last step everything is."""
    return step == last or (every is not None and step % every == 0)
