"""The data of a run: opened as all ranks agree, dealt out batch by batch, and accounted for.

What only costs requests once (finding files, reading footers) the main process does for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.checkpoint.reader import SavedRun
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.stored_values import InputSpec
from hpdist.data.files.named_files import PathRule
from hpdist.data.sources.duplicates import Report, find_duplicates
from hpdist.data.sources.fitting import training_rows
from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.label_encoding import Scale
from hpdist.data.sources.labeled import LabeledRows, open_labeled, open_test, with_categories
from hpdist.data.sources.unlabeled import (
    AnyUnlabeled,
    MixedRows,
    ParquetRows,
    SequentialRows,
    Survey,
    open_unlabeled,
    row_count,
    survey,
)
from hpdist.data.stream import BatchStream
from hpdist.data.stream.index import are_records
from hpdist.data.views import (
    AudioViewsConfig,
    FittedViews,
    TableViewsConfig,
    TextViewsConfig,
    Views,
)
from hpdist.distributed.collectives import agreed, from_main
from hpdist.errors import CheckpointError, DataError, HpdistError
from hpdist.messages.progress import working
from hpdist.models.pixels import for_channels, with_model_pixels
from hpdist.tasks.base import Task, make_task
from hpdist.tracking.audit import Audit
from hpdist.tracking.run_folder import RunFolder
from hpdist.train import opening
from hpdist.train.bad_rows import BadRows
from hpdist.train.config import RunConfig
from hpdist.train.first_look import look_at_held_out, look_at_labeled
from hpdist.train.input_choice import (
    describe_categories,
    find_row_categories,
    find_seconds,
    record_inputs,
    settle_inputs,
    widen_categories,
    with_seconds,
)
from hpdist.train.inputs import (
    ModeChoice,
    choose_mode,
    find_spec,
    is_inputs_record,
    other_casts,
    reconsider,
    with_channels,
    with_mode,
)

_FILES = "unlabeled_files.json"
_DUPLICATES = "duplicates.json"
_INPUTS = "inputs.json"
_VIEWS, _TARGETS = "views/", "targets/"  # what was measured, in a checkpoint

_log = logging.getLogger("hpdist.data")


@dataclass
class Objects:
    """What Python code gives in place of a name in the config."""

    model: nn.Module | None = None
    algorithm: Algorithm | None = None
    labeled: Any = None
    unlabeled: Any = None
    test: Any = None
    validation: Any = None


class RunData:
    """The sets that a run trains and measures on. Collective: every rank must construct it.

    Args:
        config: Of the run.
        objects: Datasets that Python code gave.
        folder: Of the run; what it chose before is read from there.
        saved: The checkpoint that the run goes on from, if it does.
        uses_unlabeled: Whether the algorithm wants unlabelled rows.

    Raises DataError or ConfigError, the same on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        objects: Objects,
        folder: RunFolder,
        *,
        saved: SavedRun | None,
        uses_unlabeled: bool,
    ) -> None:
        resumed = saved is not None
        recorded = (
            from_main(lambda: folder.read_json(_INPUTS, is_inputs_record) if resumed else None)
            or {}
        )
        self._given = config
        settled = agreed(lambda: settle_inputs(config, objects.labeled, recorded))
        config = settled.config
        views, taken = agreed(lambda: with_model_pixels(config.views, config.model))
        self.config = config.model_copy(update={"views": views})
        """The run's settings, with what the views took from the rows and the model."""
        self.folder = folder
        self.unlabeled: AnyUnlabeled | None = None
        self.unlabeled_stream: BatchStream[UnlabeledBatch] | None = None
        self.streams: dict[str, BatchStream[Any]] = {}
        source = config.data.unlabeled
        self._bad = BadRows(None if source is None else source.max_bad_rows)
        self._audit: Audit | None = None
        self.labeled: LabeledRows = agreed(lambda: self._open_labeled(settled.opened, saved))
        chosen = [*settled.lines, *self._settle_seconds(recorded)]
        self.spec: InputSpec = agreed(lambda: self._find_spec(recorded))
        choice = from_main(lambda: self._choose_mode(recorded if resumed else None))
        if choice is not None:
            self.spec = with_mode(self.spec, choice.mode)
        if uses_unlabeled and config.data.unlabeled is not None:
            self._open_unlabeled(objects, resumed)
        self.test, self.validation = agreed(
            lambda: [
                self._open_test(name, getattr(objects, name)) for name in ("test", "validation")
            ]
        )
        chosen += self._settle_categories(recorded)
        said = [*chosen, *(self._settle_mode(choice) if choice is not None else [])]
        if self.spec.kind == "image":
            views, fitted = for_channels(self.config.views, config.views, self.spec.shape[0])
            self.config = self.config.model_copy(update={"views": views})
            taken = "; ".join(filter(None, (taken, fitted))) or None
        opening.say_data(
            self.config,
            self.spec,
            self.labeled,
            self.unlabeled,
            {"test": self.test, "validation": self.validation},
            [*said, *filter(None, [taken]), *self._notes()],
            folder.main,
        )
        opening.say_lines(self._look_through(), folder.main)
        self.duplicates: Report = from_main(lambda: self._find_duplicates(resumed))
        opening.say_lines(self.duplicates.lines, folder.main)
        self.num_classes = len(self.labeled.classes)
        scale = self.labeled.encoding.scale
        spread = None if scale is None else tuple(scale.std.tolist())
        self.task: Task = make_task(config.task.name, config.task.threshold, spread)
        self.views = self._make_views()
        self._fit_views(saved)

    def _make_views(self) -> Views:
        tokenizer, views = self.spec.tokenizer, cast(Any, self.config.views)
        told: list[Any] = [] if tokenizer is None else [tokenizer.vocabulary]
        if isinstance(views, TableViewsConfig) and self.spec.categories is not None:
            told.append(self.spec.categories.groups)
        made: Views = views.build(self.config.run.seed, *told)
        return made

    def _find_spec(self, recorded: Mapping[str, Any]) -> InputSpec:
        categories = find_row_categories(self.labeled, recorded)
        return find_spec(self.config, self.labeled, categories)

    def _settle_seconds(self, recorded: Mapping[str, Any]) -> list[str]:
        """Settle how long rows of sound are, where nothing says so; say what it is. Collective."""
        found = from_main(lambda: find_seconds(self.config, self.labeled, recorded))
        if found is not None:
            self.config = with_seconds(self.config, found[0])
        return [] if found is None else [found[1]]

    def _settle_categories(self, recorded: Mapping[str, Any]) -> list[str]:
        """Take in the unlabelled rows' categories; say what all sets have of them. Collective."""
        found = from_main(lambda: widen_categories(self.spec, self.unlabeled, recorded))
        if found is None:
            return []
        self.spec = with_categories(self.spec, found)
        return from_main(lambda: describe_categories(found, self._all_sets))

    @working("opening data.labeled")
    def _open_labeled(
        self, opened: tuple[Any, str, PathRule], saved: SavedRun | None
    ) -> LabeledRows:
        config, views = self.config, self.config.views
        return open_labeled(
            config.data.labeled,
            config.run.seed,
            num_classes=getattr(config.model, "num_classes", None),
            chosen=self.folder.read_labeled_rows() if saved is not None else None,
            opened=opened,
            text=isinstance(views, TextViewsConfig),
            audio=isinstance(views, AudioViewsConfig),
            task=config.task,
            classes=saved.facts["identity"].get("classes") if saved is not None else None,
            scale=_saved_scale(saved),
            loading=config.data.loading,
        )

    @working("looking at the labelled pictures")
    def _choose_mode(self, recorded: Mapping[str, Any] | None) -> ModeChoice | None:
        """Choose the mode of pictures; a run that goes on keeps the one that it had."""
        return choose_mode(self.config, self.labeled, self.spec, recorded)

    @working("looking at the other sets' pictures")
    def _settle_mode(self, choice: ModeChoice) -> list[str]:
        """Settle the mode of pictures, now that all sets are open; say what it is. Collective."""
        sets = {name: rows for name, rows in self._all_sets.items() if name != "data.labeled"}
        settled = from_main(lambda: reconsider(choice, sets))
        self.spec = with_mode(self.spec, settled.mode)
        self.config = with_channels(self.config, settled.mode)
        return [*filter(None, [settled.line]), *agreed(lambda: other_casts(settled.mode, sets))]

    @property
    def _all_sets(self) -> dict[str, LabeledRows | AnyUnlabeled | None]:
        """The sets by the names of their settings."""
        names = ("labeled", "unlabeled", "test", "validation")
        return {f"data.{name}": getattr(self, name) for name in names}

    def _notes(self) -> list[str]:
        """What was decided about the rows of all sets that a person should know."""
        unlabeled = self.unlabeled
        parts = unlabeled.parts if isinstance(unlabeled, MixedRows) else [unlabeled]
        sets = [self.labeled, *parts, self.test, self.validation]
        return [note for rows in sets for note in getattr(rows, "notes", ())]

    @property
    def unlabeled_spec(self) -> InputSpec:
        """How unlabelled rows are decoded: as others, or with a strong view of their own."""
        column = getattr(self.config.views, "strong_column", None)
        if column is None or self.spec.tokenizer is None:
            return self.spec
        return InputSpec.of_text(self.spec.tokenizer, column)

    @working("measuring the training rows for the views")
    def _fit_views(self, saved: SavedRun | None) -> None:
        """Have views measure the training rows, or take over what they measured. Collective."""
        views = self.views
        if not isinstance(views, FittedViews):
            return
        if saved is not None:
            state = {
                k.removeprefix(_VIEWS): v for k, v in saved.common.items() if k.startswith(_VIEWS)
            }
            if not state:
                raise CheckpointError(
                    f"{saved.path} was trained with other views than views.name: "
                    f"{self.config.views.name}; choose another run.name, or make the settings agree"
                )
        else:

            def measured() -> dict[str, Tensor]:
                rows = training_rows(self.labeled, self.unlabeled, self.spec)
                views.fit(rows, self.spec.names)
                return views.state()

            state = from_main(measured)
        views.load_state(state)

    @property
    def fitted(self) -> dict[str, Tensor]:
        """What views and targets were measured to be, for the checkpoint."""
        state = self.views.state() if isinstance(self.views, FittedViews) else {}
        found = {f"{_VIEWS}{name}": value for name, value in state.items()}
        scale = self.labeled.encoding.scale
        if scale is not None:
            found[f"{_TARGETS}mean"] = torch.from_numpy(scale.mean)
            found[f"{_TARGETS}std"] = torch.from_numpy(scale.std)
        return found

    @property
    def class_counts(self) -> Tensor | None:
        """The labelled rows of each class, fp32 [classes]; None where a row is not of one class."""
        labels = torch.from_numpy(self.labeled.labels)
        return labels.bincount(minlength=self.num_classes).float() if labels.dim() == 1 else None

    @working("opening data.unlabeled")
    def _open_unlabeled(self, objects: Objects, resumed: bool) -> None:
        source, loading = self.config.data.unlabeled, self.config.data.loading
        spec = self.unlabeled_spec
        assert source is not None
        found = None
        if objects.unlabeled is None:

            def surveyed() -> Survey:
                recorded = self.folder.read_json(_FILES, are_records) if resumed else None
                return survey(source, self.labeled, spec, loading, recorded)

            found = from_main(surveyed)
        self.unlabeled = agreed(
            lambda: open_unlabeled(
                source,
                self.labeled,
                spec,
                dataset=objects.unlabeled,
                found=found,
                loading=loading,
                seed=self.config.run.seed,
            )
        )
        if isinstance(self.unlabeled, SequentialRows) and self.folder.main:
            _log.warning("%s", self.unlabeled.warning)

    def _open_test(self, name: str, dataset: Any) -> LabeledRows | None:
        source = getattr(self.config.data, name)
        if source is None:
            return None
        loading, where = self.config.data.loading, f"data.{name}"
        with working(f"opening {where}"):
            return open_test(
                source, self.labeled, self.spec, dataset=dataset, where=where, loading=loading
            )

    @working("looking for rows that cannot be read")
    def _look_through(self) -> list[str]:
        """Decode labelled and held-out rows before the training; say what is to say. Collective."""
        told = [look_at_labeled(self.labeled, self.spec)]
        for rows in (self.test, self.validation):
            if rows is not None:
                line, named = look_at_held_out(rows, self.spec)
                told.append(line)
                self._bad.note_named(rows.name, named)
        return [line for line in told if line is not None]

    def _find_duplicates(self, resumed: bool) -> Report:
        """Held-out rows that are training rows too; a run that goes on has looked already."""
        config = self.config.data.duplicates
        kept = self.folder.read_json(_DUPLICATES, Report.fits) if resumed else None
        if kept is not None and kept["check"] == config.check:
            return Report(**kept)
        sets = {"test": self.test, "validation": self.validation}
        held = {name: rows for name, rows in sets.items() if rows is not None}
        pools = {"labeled": self.labeled, "unlabeled": self.unlabeled}
        used = {name: rows for name, rows in pools.items() if rows is not None}
        return find_duplicates(config, held, used)

    def start(self, rank: int, world_size: int, *, files: bool) -> None:
        """Open this rank's streams; with `files` their audit is kept too."""
        loading, batch = self.config.data.loading, self.config.batch
        make: Callable[..., BatchStream[Any]] = partial(
            BatchStream[Any],
            rank=rank,
            world_size=world_size,
            seed=self.config.run.seed,
            spec=self.spec,
            threads=loading.threads,
            processes=loading.processes,
        )
        self.rank = self._bad.rank = rank
        self.world_size = world_size
        self._make_stream = make
        self.labeled_stream: BatchStream[LabeledBatch] = make(
            self.labeled, batch.labeled, processes=0
        )
        self.streams = {"labeled": self.labeled_stream}
        source = self.config.data.unlabeled
        if self.unlabeled is not None and source is not None:
            self.unlabeled_stream = make(self.unlabeled, batch.unlabeled, spec=self.unlabeled_spec)
            self.streams["unlabeled"] = self.unlabeled_stream
            if files and source.audit:
                self._audit = Audit(self.folder.path / "audit", rank)

    def record(self) -> None:
        """Write down what the run has chosen, for a resume to choose the same."""
        self.folder.write_json("labeled_rows.json", self.labeled.chosen)
        self.folder.write_json("classes.json", self.labeled.classes.names)
        self.folder.write_json(_DUPLICATES, self.duplicates.to_json())
        inputs = record_inputs(self.config, self._given, self.spec)
        if inputs:
            self.folder.write_json(_INPUTS, inputs)
        rows = self.unlabeled
        parts = rows.parts if isinstance(rows, MixedRows) else [rows]
        if any(isinstance(part, ParquetRows) for part in parts):
            files = [p.index.record() if isinstance(p, ParquetRows) else None for p in parts]
            self.folder.write_json(_FILES, files)

    def next(self) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        """Give this rank's slices of the next global batches."""
        labeled = next(self.labeled_stream)
        return labeled, next(self.unlabeled_stream) if self.unlabeled_stream else None

    def sweep(self) -> Iterator[UnlabeledBatch]:
        """Every unlabelled row once: this rank's slices of batches that begin an epoch.

        Rows of the last batch that are not of epoch 0 are there for equal shapes only. Collective:
        every rank must go through all of them; raises DataError on all ranks alike.
        """
        rows, batch = self.unlabeled_rows, self.config.batch.unlabeled
        if rows is None:
            raise DataError("data.unlabeled: how many rows there are is not known")
        stream: BatchStream[UnlabeledBatch] = self._make_stream(
            self.unlabeled, batch, spec=self.unlabeled_spec
        )
        try:
            with working("going through the unlabelled rows", rows, "rows") as work:
                for _ in range(-(-rows // batch)):
                    agreed(stream.look_ahead)
                    yield next(stream)
                    work.add(batch)
        finally:
            stream.close()

    def look_ahead(self, give_up: Callable[[], bool] = lambda: False) -> HpdistError | None:
        """Wait for the batches that `next` will give; what stands in their way, if anything."""
        try:
            for stream in self.streams.values():
                stream.look_ahead(give_up)
        except HpdistError as error:
            return error
        return None

    @property
    def unlabeled_rows(self) -> int | None:
        """How many unlabelled rows there are, where that is known."""
        return None if self.unlabeled is None else row_count(self.unlabeled)

    @property
    def epoch(self) -> int:
        """How often the unlabelled rows, or else the labelled ones, have been gone through."""
        return (self.unlabeled_stream or self.labeled_stream).epoch

    @property
    def waited(self) -> float:
        """Seconds that this rank has waited for rows."""
        return sum(stream.waited for stream in self.streams.values())

    def account(
        self, batch: UnlabeledBatch | None, attempt: int, applied: bool, bad_rows: int
    ) -> DataError | None:
        """Take note of what a step consumed; `bad_rows` are those of all ranks.

        Gives an error, on all ranks alike, where an epoch has had too many.
        """
        if batch is None:
            return None
        if self._audit is not None:
            self._audit.add(attempt, applied, batch)
        return self._bad.add(batch.bad, bad_rows, self.epoch)

    @property
    def bad_rows(self) -> int:
        """Rows of the whole run that could not be used, of all ranks."""
        return self._bad.count

    def take_audit(self) -> Callable[[], None]:
        """A call that writes the audit up to here, for the checkpoint that it belongs to."""
        return self._audit.take() if self._audit is not None else lambda: None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the streams' positions."""
        return self._bad.state()

    def load_state(self, state: Mapping[str, Any], attempts: int) -> None:
        """Go on from a checkpoint; what was written after it is dropped."""
        self._bad.load_state(state)
        self.drop_audit_after(attempts)

    def drop_audit_after(self, attempts: int) -> None:
        """Remove what an earlier process wrote of later attempts."""
        if self._audit is not None and self.folder.main:
            self._audit.drop_after(attempts)

    def evaluation_batches(self, rows: LabeledRows) -> Iterator[tuple[LabeledBatch, Tensor]]:
        """Every row of a measured set once, over all ranks."""
        batch, tell = self.config.eval.batch, partial(self._bad.name_held_out, rows.name)
        return evaluation_batches(rows, self.spec, batch, self.rank, self.world_size, tell)

    def close(self) -> None:
        """Stop the reading threads."""
        for stream in self.streams.values():
            stream.close()


def _saved_scale(saved: SavedRun | None) -> Scale | None:
    """What a run that goes on standardised its targets by."""
    if saved is None or f"{_TARGETS}mean" not in saved.common:
        return None
    return Scale(*(saved.common[f"{_TARGETS}{name}"].numpy() for name in ("mean", "std")))
