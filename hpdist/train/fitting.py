"""Numbers that a run measures on its training rows and keeps: the views', and the targets'."""

from __future__ import annotations

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
from hpdist.data.views.make import TARGETS, VIEWS, make_views
from hpdist.distributed.collectives import run_on_main
from hpdist.errors import CheckpointError
from hpdist.messages.progress import working


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
    views = make_views(config, seed, spec)
    if not isinstance(views, FittedViews):
        return views
    if saved is not None:
        state = {k.removeprefix(VIEWS): v for k, v in saved.common.items() if k.startswith(VIEWS)}
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


def fitted_state(views: Views, encoding: Encoding) -> dict[str, Tensor]:
    """Return the measured numbers of views and targets, for the checkpoint."""
    state = views.state() if isinstance(views, FittedViews) else {}
    found = {f"{VIEWS}{name}": value for name, value in state.items()}
    measured = {name: torch.from_numpy(array) for name, array in encoding.state.items()}
    return found | {f"{TARGETS}{name}": value for name, value in measured.items()}


def saved_targets(saved: SavedRun | None) -> dict[str, Array] | None:
    """Return what a continued run measured on its labels; None where it has nothing."""
    if saved is None:
        return None
    found = {name: value for name, value in saved.common.items() if name.startswith(TARGETS)}
    return {name.removeprefix(TARGETS): value.numpy() for name, value in found.items()} or None
