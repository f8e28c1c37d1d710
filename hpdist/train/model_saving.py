"""The model that a run leaves: `model/`, and what checkpoints need beside their weights.

`model.json` says how the model is built and fed; it is written when the run begins, so that a
checkpoint can be loaded as a model without the training's config. `model/` is written at each new
best score on the validation set, and at the end: see `hpdist.evaluate.model_folder`.
"""

from __future__ import annotations

import secrets
from typing import Any

from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import CheckpointError, ConfigError
from hpdist.evaluate import model_folder
from hpdist.evaluate.description import (
    RUN_DESCRIPTION,
    Description,
    HeadFacts,
    InputFacts,
    RunFacts,
    describe_labels,
    read_description,
)
from hpdist.messages.progress import working
from hpdist.models.plain import plain_model
from hpdist.tracking.console import Console
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.config import RunConfig
from hpdist.train.model import RunModel
from hpdist.train.sets import RunSets
from hpdist.train.state import RunState
from hpdist.version import __version__


class ModelSaving:
    """Writes what a run knows of its model.

    Args:
        config: The run's settings.
        sets: Of the run.
        model: Of the run.
        state: Of the run, whose teacher is written.
        folder: Of the run.
        sharding: How the run shards, and in which precision it computes.
        files: Whether anything is written.
    """

    def __init__(
        self,
        config: RunConfig,
        sets: RunSets,
        model: RunModel,
        state: RunState,
        folder: RunFolder,
        sharding: ExecutionPlan,
        *,
        files: bool,
    ) -> None:
        self._config = config
        self._sets = sets
        self._model = model
        self._state = state
        self._folder = folder
        self._sharding = sharding
        self._files = files
        self._save = getattr(config.model, "save", "full")
        self._log = Console(0, 0, folder.main).log_line

    def describe(self, *, done: bool) -> None:
        """Write `model.json`; one that is there keeps the run's id. Collective.

        That of a run that is done stays as it is.
        """
        if self._files:
            call_on_all_ranks(lambda: self._write_description(done))

    def keep_best(self) -> None:
        """Write `model/` if the latest score on the validation set is the best so far. Collective.

        Where that fails, as on a full disk, the training goes on, and `model/` is what it was.
        """
        best = self._state.best
        if best is None or best[1] != self._state.step.applied_steps:
            return
        try:
            self._write("best")
        except CheckpointError as error:
            self._log(f"note: {error}; the training continues")

    def finish(self) -> None:
        """Write `model/` at the end, unless it holds the best on the validation set. Collective.

        Raises CheckpointError, on all ranks, where that fails.
        """
        best = self._state.best
        if not self._files or self._save == "none":
            return
        step = run_on_main(self._written_step)
        if step is None or step != (self._state.step.applied_steps if best is None else best[1]):
            self._write("last")
        else:
            run_on_main(lambda: model_folder.remove_leftovers(self._folder.path))

    def _written_step(self) -> int | None:
        """The step of the weights in `model/`; None where there are none."""
        folder = model_folder.find(self._folder.path)
        try:
            return None if folder is None else model_folder.read(folder).step
        except CheckpointError:  # it is written anew
            return None

    @working("writing the model")
    def _write(self, chosen: str) -> None:
        if not self._files or self._save == "none":
            return
        try:
            model = self._model.teacher_on_main(self._state.step)
        except ConfigError as error:  # a given module that cannot be copied
            self._log(f"note: model/ is not written: {error}")
            return
        spec, sets = self._sets.spec, self._sets

        def write() -> None:
            assert model is not None  # this rank is the main one
            plain = plain_model(model, sets.views.plain(spec.example(2)))
            half = self._sharding.precision if self._save == "half" else "fp32"
            found = self._description().model_copy(
                update={"step": self._state.step.applied_steps, "chosen": chosen, "weights": half}
            )
            place = self._folder.path / model_folder.MODEL
            model_folder.write(place, found, plain, spec, sets.fitted)

        run_on_main(write)

    def _write_description(self, done: bool) -> None:
        there = (self._folder.path / RUN_DESCRIPTION).exists()
        if self._folder.main and not (done and there):
            self._folder.write_text(RUN_DESCRIPTION, self._description().to_json())

    def _run_id(self) -> str:
        """The id in the run folder, or a new one."""
        try:
            return read_description(self._folder.path / RUN_DESCRIPTION).run.id
        except CheckpointError:
            return secrets.token_hex(8)

    def _description(self) -> Description:
        """Say what the run's model is, without its weights."""
        sets, config = self._sets, self._sets.config
        labeled = sets.labeled
        column = labeled.column
        return Description(
            hpdist=__version__,
            run=RunFacts(id=self._run_id(), name=self._config.run.name or "run"),
            model=config.model.model_dump(mode="json"),
            outputs=sets.output_size,
            heads=self._heads(),
            task=config.task.model_dump(mode="json"),
            labels=describe_labels(labeled.label_column, labeled.encoding, labeled.unlabeled_value),
            views=config.views.model_dump(mode="json"),
            inputs=InputFacts(
                kind=sets.spec.kind,
                reader=labeled.kind.name,
                column=column if isinstance(column, str) else list(column),
                spec=sets.spec.record(),
            ),
            seed=config.run.seed,
            batch=config.eval.batch,
            test=self._test(),
            precision=self._sharding.precision,
        )

    def _heads(self) -> HeadFacts | None:
        """What makes the head that predicts, if the algorithm has one."""
        config = self._config
        if self._state.step.algorithm.predicts is None:
            return None
        return HeadFacts(
            algorithm=config.algorithm.model_dump(mode="json"),
            addons=[addon.model_dump(mode="json") for addon in config.addons],
            steps=config.steps,
        )

    def _test(self) -> dict[str, Any] | None:
        """The settings of the test set, by which it can be opened again."""
        data = self._sets.config.data
        if data.test is None:
            return None
        return {
            "set": data.test.model_dump(mode="json"),
            "loading": data.loading.model_dump(mode="json"),
        }
