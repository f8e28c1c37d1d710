"""The labelled set of a run, and what its rows say of how inputs are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from hpdist.checkpoint.reader import SavedRun
from hpdist.data.decode.stored_values import InputSpec
from hpdist.data.files.named_files import PathRule
from hpdist.data.sources.labeled import LabeledRows, open_labeled
from hpdist.data.views import AudioViewsConfig, TextViewsConfig
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.messages.progress import working
from hpdist.models.pixels import with_model_pixels
from hpdist.tasks.base import Task, TaskConfig
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.config import RunConfig
from hpdist.train.fitting import saved_targets
from hpdist.train.input_choice import (
    find_row_categories,
    find_seconds,
    settle_inputs,
    with_seconds,
)
from hpdist.train.inputs import ModeChoice, choose_mode, find_spec, with_mode


@dataclass(frozen=True)
class LabeledInputs:
    """The labelled set, opened, and the inputs that it asks for; other sets may add to these."""

    config: RunConfig
    """The run's settings, with what the views took from the rows and the model."""
    views: Any
    """The settings of the views before they took anything from the model."""
    task: Task
    """What the labels are, before it goes by them."""
    labeled: LabeledRows
    spec: InputSpec
    mode: ModeChoice | None
    """The mode of pictures, so far; None where the inputs are no encoded pictures."""
    lines: tuple[str, ...]
    """What was decided, for a person."""
    pixels: str | None
    """What the views took from the model, for a person."""


def open_labeled_inputs(
    config: RunConfig,
    dataset: Any,
    recorded: Mapping[str, Any],
    folder: RunFolder,
    saved: SavedRun | None,
) -> LabeledInputs:
    """Open the labelled set and settle what its rows say of the inputs. Collective.

    Args:
        config: The run's settings.
        dataset: Rows that Python code gave, or None.
        recorded: What the run wrote down of its inputs when it began; {} of one that begins.
        folder: The run's folder, which knows the rows that the run chose.
        saved: The checkpoint that the run goes on from, or None.

    Raises DataError or ConfigError, the same on every rank.
    """
    settled = call_on_all_ranks(lambda: settle_inputs(config, dataset, recorded))
    asked = settled.config
    views, pixels = call_on_all_ranks(lambda: with_model_pixels(asked.views, asked.model))
    chosen = asked.model_copy(update={"views": views})
    task = cast(TaskConfig, config.task).build()
    labeled = call_on_all_ranks(lambda: _open_labeled(chosen, task, settled.opened, folder, saved))
    lines = list(settled.lines)
    seconds = run_on_main(lambda: find_seconds(chosen, labeled, recorded))
    if seconds is not None:
        chosen = with_seconds(chosen, seconds[0])
        lines.append(seconds[1])
    spec = call_on_all_ranks(
        lambda: find_spec(chosen, labeled, find_row_categories(labeled, recorded))
    )
    kept = None if saved is None else recorded
    mode = run_on_main(lambda: _choose_mode(chosen, labeled, spec, kept))
    if mode is not None:
        spec = with_mode(spec, mode.mode)
    return LabeledInputs(chosen, asked.views, task, labeled, spec, mode, tuple(lines), pixels)


@working("opening data.labeled")
def _open_labeled(
    config: RunConfig,
    task: Task,
    opened: tuple[Any, str, PathRule],
    folder: RunFolder,
    saved: SavedRun | None,
) -> LabeledRows:
    return open_labeled(
        config.data.labeled,
        config.run.seed,
        labels=task,
        num_classes=getattr(config.model, "num_classes", None),
        chosen=folder.read_labeled_rows() if saved is not None else None,
        opened=opened,
        text=isinstance(config.views, TextViewsConfig),
        audio=isinstance(config.views, AudioViewsConfig),
        classes=saved.facts["identity"].get("classes") if saved is not None else None,
        measured=saved_targets(saved),
        loading=config.data.loading,
    )


@working("looking at the labelled pictures")
def _choose_mode(
    config: RunConfig, labeled: LabeledRows, spec: InputSpec, recorded: Mapping[str, Any] | None
) -> ModeChoice | None:
    """Choose the mode of pictures; a run that goes on keeps the one that it had."""
    return choose_mode(config, labeled, spec, recorded)
