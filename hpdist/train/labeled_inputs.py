"""The labelled set of a run, and what its rows say of how inputs are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from hpdist.checkpoint.reader import SavedRun
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import Context, Facts, InputKind
from hpdist.data.sources.labeled import LabeledRows, open_labeled
from hpdist.data.sources.own_files import limits_of
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.errors import ConfigError, HpdistError, describe
from hpdist.messages.progress import working
from hpdist.models.pixels import with_model_pixels
from hpdist.tasks.base import Task, TaskConfig
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.config import RunConfig
from hpdist.train.fitting import saved_targets
from hpdist.train.input_choice import Settled, settle_inputs


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
    facts: Facts
    """What the labelled rows told of the inputs."""
    context: Context
    lines: tuple[str, ...]
    """What was decided before that, for a person."""
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
    labeled = call_on_all_ranks(lambda: _open_labeled(chosen, task, settled, folder, saved))
    kind, limits = settled.kind, limits_of(chosen.data.loading)
    context = Context(chosen.model, recorded, saved is not None, limits)
    facts: Facts = run_on_main(
        lambda: _of_kind(kind, lambda: kind.measure(views, labeled, context))
    )
    completed = kind.fill_views(views, facts.values)
    chosen = chosen.model_copy(update={"views": completed})
    spec: InputSpec = call_on_all_ranks(
        lambda: _of_kind(kind, lambda: kind.make_spec(completed, labeled, context, facts.values))
    )
    lines = settled.lines
    return LabeledInputs(chosen, asked.views, task, labeled, spec, facts, context, lines, pixels)


def _of_kind(kind: InputKind, call: Callable[[], Any]) -> Any:
    """Call what a kind defines, which may be somebody's own. Raises ConfigError where it fails."""
    try:
        return call()
    except HpdistError:
        raise
    except Exception as error:
        raise ConfigError(f"the input kind {kind.name} failed: {describe(error)}") from error


@working("opening data.labeled")
def _open_labeled(
    config: RunConfig, task: Task, settled: Settled, folder: RunFolder, saved: SavedRun | None
) -> LabeledRows:
    return open_labeled(
        config.data.labeled,
        config.run.seed,
        labels=task,
        num_classes=getattr(config.model, "num_classes", None),
        chosen=folder.read_labeled_rows() if saved is not None else None,
        opened=settled.opened,
        kind=settled.kind,
        column=settled.column,
        classes=saved.facts["identity"].get("classes") if saved is not None else None,
        measured=saved_targets(saved),
        loading=config.data.loading,
        once=run_on_main,
    )
