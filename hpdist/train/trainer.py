"""Trains from labelled and unlabelled rows: the entry point from Python.

Trainer("wide_resnet", "fixmatch", labeled=train, unlabeled=more, test=test, steps=10_000).fit()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from hpdist.algorithms.base import Algorithm
from hpdist.data.sources.labeled import LabeledRows
from hpdist.distributed.collectives import world_size
from hpdist.errors import DistributedError
from hpdist.evaluate.scoring import Evaluation
from hpdist.messages.redaction import redacted_errors
from hpdist.train import config as configuration
from hpdist.train.build import build_run
from hpdist.train.config import RunConfig
from hpdist.train.given import InMemoryInputs, algorithm_given, model_given, rows_given
from hpdist.train.loop import RunLoop
from hpdist.train.outcome import StepOutcome


class Trainer(RunLoop):
    """Trains a model from labelled and unlabelled rows, on any number of launched ranks.

    Its methods may be called in any order: `save`, `evaluate` and `close` before `fit`, `evaluate`
    after it. As a context manager it closes itself at the end.

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
        `steps=1000`. With `run={"name": …}` the run continues if its folder has one; without,
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
        objects = InMemoryInputs()
        sets = {"labeled": labeled, "unlabeled": unlabeled, "test": test, "validation": validation}
        given = {name: rows for name, rows in sets.items() if rows is not None}
        values = {
            "data": {name: rows_given(name, rows, objects) for name, rows in given.items()},
            "algorithm": algorithm_given(algorithm, objects),
            "model": model_given(model, objects),
            **settings,
        }
        super().__init__(build_run(configuration.parse(values), objects))

    @classmethod
    @redacted_errors()
    def from_config(cls, config: RunConfig, *, files: bool = True) -> Trainer:
        """Make the trainer of a config; without `files` it writes nothing. Collective."""
        trainer = cls.__new__(cls)
        RunLoop.__init__(trainer, build_run(config, files=files))
        return trainer

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, files: bool = True) -> Trainer:
        """Make the trainer from nested settings, as in a config file. Collective."""
        return cls.from_config(configuration.parse(settings), files=files)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @redacted_errors()
    def evaluate(self, rows: LabeledRows) -> Evaluation:
        """Evaluate teacher and student on all rows of a set, such as `trainer.data.test`.

        Works at any time, also after `close`. Collective: every rank must call. Raises
        DistributedError if the ranks that trained have left their process group.
        """
        trained_on = self.step.engine.world_size
        if world_size() != trained_on:
            raise DistributedError(
                f"evaluate: the run has {trained_on} ranks, which have left their process group; "
                "call it before that"
            )
        return self.measuring.evaluate(rows)

    @redacted_errors()
    def dry_run(self) -> StepOutcome:
        """Do one step and write nothing. Collective."""
        for outcome in self.trial_steps(1):
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in outcome.metrics.items())
            self.log.log_line(f"dry run: one step, {numbers}; nothing was written")
        return outcome

    def trial_steps(self, attempts: int) -> Iterator[StepOutcome]:
        """Attempt a step on each request, and write nothing. Collective."""
        self._check_open()
        self._open_log(files=False)
        try:
            self._first_rows()
            for _ in range(attempts):
                yield self._attempt(measure=True).outcome
        finally:
            self.close()

    def student_model(self) -> nn.Module:
        """Return a plain model with the student's weights, on the CPU, in fp32 and evaluation mode.

        It needs neither hpdist nor other ranks. Collective: every rank must call.
        """
        return self.run.model.student(self.step)

    def teacher_model(self) -> nn.Module:
        """Return such a model with the teacher's weights, which scores refer to. Collective."""
        return self.run.model.teacher(self.step)
