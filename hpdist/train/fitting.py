"""What a run measures on its training rows and keeps: the views' numbers, and the targets'."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hpdist.checkpoint.reader import SavedRun
from hpdist.config.component import Component
from hpdist.data.decode.spec import InputSpec
from hpdist.data.sources.fitting import training_rows
from hpdist.data.sources.label_encoding import Scale
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled
from hpdist.data.views import FittedViews, Views
from hpdist.distributed.collectives import run_on_main
from hpdist.errors import CheckpointError
from hpdist.messages.progress import working

_VIEWS, _TARGETS = "views/", "targets/"  # their names in a checkpoint


@working("measuring the training rows for the views")
def fitted_views(
    config: Component,
    seed: int,
    spec: InputSpec,
    labeled: LabeledRows,
    unlabeled: AnyUnlabeled | None,
    saved: SavedRun | None,
) -> Views:
    """Make the views, with what they measure on the training rows or had measured. Collective.

    Raises CheckpointError where the run that goes on had other views.
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
    """Build the views; those of the rows' own kind are told more of it."""
    own = getattr(config, "input_kind", None) == spec.kind
    told = spec.view_arguments if own and "input_kind" not in type(config).model_fields else ()
    made: Views = cast(Any, config).build(seed, *told)
    return made


def fitted_state(views: Views, scale: Scale | None) -> dict[str, Tensor]:
    """Give what views and targets were measured to be, for the checkpoint."""
    state = views.state() if isinstance(views, FittedViews) else {}
    found = {f"{_VIEWS}{name}": value for name, value in state.items()}
    if scale is not None:
        found[f"{_TARGETS}mean"] = torch.from_numpy(scale.mean)
        found[f"{_TARGETS}std"] = torch.from_numpy(scale.std)
    return found


def saved_scale(saved: SavedRun | None) -> Scale | None:
    """Give what a run that goes on standardised its targets by."""
    if saved is None or f"{_TARGETS}mean" not in saved.common:
        return None
    return Scale(*(saved.common[f"{_TARGETS}{name}"].numpy() for name in ("mean", "std")))
