"""Numbers that a run measures on its training rows and keeps: the views', and the targets'."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hpdist.checkpoint.reader import SavedRun
from hpdist.config.component import Component
from hpdist.data.decode.encoded import Array
from hpdist.data.decode.spec import InputSpec
from hpdist.data.sources.fitting import training_rows
from hpdist.data.sources.label_encoding import Encoding
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled
from hpdist.data.views import FittedViews, Views
from hpdist.distributed.collectives import run_on_main
from hpdist.errors import CheckpointError
from hpdist.messages.progress import working

_VIEWS, _TARGETS = "views/", "targets/"  # prefixes in a checkpoint


@working("measuring the training rows for the views")
def fitted_views(
    config: Component,
    seed: int,
    spec: InputSpec,
    labeled: LabeledRows,
    unlabeled: AnyUnlabeled | None,
    saved: SavedRun | None,
) -> Views:
    """Make the views, with numbers measured on the training rows or restored. Collective.

    Raises CheckpointError if the continued run had other views.
    """
    views = _make_views(config, seed, spec)
    if not isinstance(views, FittedViews):
        return views
    if saved is not None:
        state = {k.removeprefix(_VIEWS): v for k, v in saved.common.items() if k.startswith(_VIEWS)}
        if not state:
            raise CheckpointError(
                f"{saved.path} was trained with other views than views.name: "
                f"{config.name}; choose another run.name, or make the settings agree"
            )
    else:

        def measured() -> dict[str, Tensor]:
            views.fit(training_rows(labeled, unlabeled, spec), spec.feature_names)
            return views.state()

        state = run_on_main(measured)
    views.load_state(state)
    return views


def _make_views(config: Component, seed: int, spec: InputSpec) -> Views:
    """Build the views; those for the rows' own kind get what its spec has for them."""
    own = getattr(config, "input_kind", None) == spec.kind
    is_set = "input_kind" in type(config).model_fields
    arguments = spec.view_arguments if own and not is_set else ()
    made: Views = cast(Any, config).build(seed, *arguments)
    return made


def fitted_state(views: Views, encoding: Encoding) -> dict[str, Tensor]:
    """Return the measured numbers of views and targets, for the checkpoint."""
    state = views.state() if isinstance(views, FittedViews) else {}
    found = {f"{_VIEWS}{name}": value for name, value in state.items()}
    measured = {name: torch.from_numpy(array) for name, array in encoding.state.items()}
    return found | {f"{_TARGETS}{name}": value for name, value in measured.items()}


def saved_targets(saved: SavedRun | None) -> dict[str, Array] | None:
    """Return what a continued run measured on its labels; None where it has nothing."""
    if saved is None:
        return None
    found = {name: value for name, value in saved.common.items() if name.startswith(_TARGETS)}
    return {name.removeprefix(_TARGETS): value.numpy() for name, value in found.items()} or None
