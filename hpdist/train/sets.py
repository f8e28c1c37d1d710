"""The sets of a run: opened one after the other, as all ranks agree, and then finished.

What only costs requests once (finding files, reading footers) the main process does for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hpdist.checkpoint.reader import SavedRun
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import Facts, kind_named
from hpdist.data.sources.duplicates import Report
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.sources.stored_labels import StoredLabels
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled, MixedRows, row_count
from hpdist.data.views import Views
from hpdist.distributed.collectives import run_on_main
from hpdist.tasks.base import Task
from hpdist.tracking.run_folder import TASK, RunFolder
from hpdist.train import opening
from hpdist.train.config import RunConfig
from hpdist.train.fitting import fitted_state, fitted_views
from hpdist.train.given import InMemoryInputs
from hpdist.train.input_choice import is_inputs_record, record_inputs
from hpdist.train.labeled_inputs import LabeledInputs, open_labeled_inputs
from hpdist.train.other_sets import (
    find_repeated,
    look_through,
    open_held_out,
    open_stored_set,
    open_unlabeled_set,
    record_other_sets,
    unlabeled_spec,
)

_INPUTS = "inputs.json"
_HELD_OUT = ("test", "validation")

_Sets: TypeAlias = "Mapping[str, LabeledRows | AnyUnlabeled | None]"


@dataclass(frozen=True)
class RunSets:
    """The sets that a run trains and measures on, and how their rows become inputs."""

    asked: RunConfig
    """The run's settings before anything was chosen."""
    config: RunConfig
    """The run's settings, with what the views took from the rows and the model."""
    spec: InputSpec
    facts: Facts
    """What the rows told of the inputs, which a resume must find the same."""
    labeled: LabeledRows
    unlabeled: AnyUnlabeled | None
    test: LabeledRows | None
    validation: LabeledRows | None
    duplicates: Report
    """The held-out rows that are training rows too."""
    unreadable: Mapping[str, set[int]]
    """Ids of held-out rows that were named as unreadable, by set."""
    task: Task
    views: Views
    stored: StoredLabels | None = None
    """Labels of the unlabelled rows that were stored before the run."""

    @property
    def num_classes(self) -> int:
        """The number of classes of the labelled set."""
        return len(self.labeled.classes)

    @property
    def output_size(self) -> int:
        """The logits of a row."""
        return self.task.output_size(self.num_classes)

    @property
    def unlabeled_spec(self) -> InputSpec:
        """How unlabelled rows are decoded: as others, or with a strong view of their own."""
        return unlabeled_spec(self.config.views, self.spec)

    @property
    def unlabeled_rows(self) -> int | None:
        """How many unlabelled rows there are, where that is known."""
        return None if self.unlabeled is None else row_count(self.unlabeled)

    @property
    def class_counts(self) -> Tensor | None:
        """The labelled rows of each class, fp32 [classes]; None where a row is not of one class."""
        numbers = self.labeled.class_numbers
        if numbers is None:
            return None
        return torch.from_numpy(numbers).bincount(minlength=self.num_classes).float()

    @property
    def fitted(self) -> dict[str, Tensor]:
        """What views and targets were measured to be, for the checkpoint."""
        return fitted_state(self.views, self.labeled.encoding)

    def record(self, folder: RunFolder) -> None:
        """Write down what the run has chosen, for a resume to choose the same."""
        folder.write_json("labeled_rows.json", self.labeled.chosen)
        folder.write_json("classes.json", self.labeled.classes.names)
        folder.write_json(TASK, self.task.display())
        inputs = record_inputs(self.config, self.asked, self.facts)
        if inputs:
            folder.write_json(_INPUTS, inputs)
        record_other_sets(folder, self.duplicates, self.unlabeled, self.stored)


def open_sets(
    config: RunConfig,
    objects: InMemoryInputs,
    folder: RunFolder,
    *,
    saved: SavedRun | None,
    uses_unlabeled: bool,
) -> RunSets:
    """Open all sets of a run, and say what they hold. Collective: every rank must call.

    Args:
        config: The run's settings.
        objects: Rows that Python code gave.
        folder: The run's folder; what the run chose before is read from there.
        saved: The checkpoint that the run goes on from, or None.
        uses_unlabeled: Whether the algorithm wants unlabelled rows.

    Raises DataError or ConfigError, the same on every rank.
    """
    resumed = saved is not None
    recorded = (
        run_on_main(lambda: folder.read_json(_INPUTS, is_inputs_record) if resumed else None) or {}
    )
    first = open_labeled_inputs(config, objects.labeled, recorded, folder, saved)
    labeled = first.labeled
    unlabeled: AnyUnlabeled | None = None
    data, seed = first.config.data, config.run.seed
    source = data.unlabeled_rows if uses_unlabeled else None
    if source is not None:
        unlabeled = open_unlabeled_set(
            source,
            unlabeled_spec(first.config.views, first.spec),
            labeled,
            folder,
            loading=data.loading,
            seed=seed,
            dataset=objects.labeled if data.labeled.marks_unlabeled else objects.unlabeled,
            resumed=resumed,
        )
    stored = None
    if unlabeled is not None and data.unlabeled is not None and data.unlabeled.pseudo_labels:
        names = labeled.classes.names
        stored = open_stored_set(data.unlabeled.pseudo_labels, unlabeled, names, folder, resumed)
    datasets = {name: getattr(objects, name) for name in _HELD_OUT}
    held_out = open_held_out(data, first.spec, labeled, datasets)
    config_now, spec, facts, decided = _settle(first, unlabeled, held_out)
    opening.log_data(config_now, spec, labeled, unlabeled, held_out, decided, folder.main)
    lines, unreadable = look_through(labeled, held_out, spec)
    opening.log_lines(lines, folder.main)
    duplicates = run_on_main(
        lambda: find_repeated(
            data.duplicates, labeled, unlabeled, held_out, folder, resumed=resumed
        )
    )
    opening.log_lines(duplicates.lines, folder.main)
    return RunSets(
        asked=config,
        config=config_now,
        spec=spec,
        facts=facts,
        labeled=labeled,
        unlabeled=unlabeled,
        test=held_out["test"],
        validation=held_out["validation"],
        duplicates=duplicates,
        unreadable=unreadable,
        task=first.task.fitted(labeled.encoding),
        views=fitted_views(config_now.views, seed, spec, labeled, unlabeled, saved),
        stored=stored,
    )


def _settle(
    first: LabeledInputs,
    unlabeled: AnyUnlabeled | None,
    held_out: Mapping[str, LabeledRows | None],
) -> tuple[RunConfig, InputSpec, Facts, list[str]]:
    """Settle what all sets say of the inputs, now that they are open. Collective.

    Gives the settings, the inputs, what the rows told, and lines for a person about what was
    decided.
    """
    config, kind = first.config, kind_named(first.spec.kind)
    sets: _Sets = {"labeled": first.labeled, "unlabeled": unlabeled, **held_out}
    named = {f"data.{name}": rows for name, rows in sets.items()}
    facts = run_on_main(lambda: kind.measure_sets(first.spec, first.facts, named, first.context))
    spec, views, fitted = kind.finish(first.spec, config.views, first.views, facts.values)
    config = config.model_copy(update={"views": views})
    taken = "; ".join(filter(None, [first.pixels, fitted]))
    lines = [*first.lines, *facts.lines, *([taken] if taken else []), *_notes(sets)]
    return config, spec, facts, lines


def _notes(sets: _Sets) -> list[str]:
    """What was decided about the rows of all sets that a person should know."""
    found = []
    for rows in sets.values():
        parts = rows.parts if isinstance(rows, MixedRows) else [rows]
        found += [note for part in parts for note in getattr(part, "notes", ())]
    return found
