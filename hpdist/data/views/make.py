"""Makes views from their settings, for rows that a spec decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from hpdist.config.component import Component
from hpdist.data.decode.spec import InputSpec
from hpdist.data.views.base import FittedViews, Views
from hpdist.errors import CheckpointError

VIEWS, TARGETS = "views/", "targets/"
"""Prefixes, in a checkpoint, of what views and the encoding of labels measured."""


def make_views(config: Component, seed: int, spec: InputSpec) -> Views:
    """Build the views; those for the rows' own kind get what its spec has for them."""
    own = getattr(config, "input_kind", None) == spec.kind
    is_set = "input_kind" in type(config).model_fields
    arguments = spec.view_arguments if own and not is_set else ()
    made: Views = cast(Any, config).build(seed, *arguments)
    return made


def fitted_views(
    config: Component, seed: int, spec: InputSpec, fitted: Mapping[str, Tensor], where: str
) -> Views:
    """Build the views with what they measured, which `fitted` has under `VIEWS`.

    Raises CheckpointError, which names `where` that is from, if it lacks it.
    """
    views = make_views(config, seed, spec)
    if isinstance(views, FittedViews):
        state = {k.removeprefix(VIEWS): v for k, v in fitted.items() if k.startswith(VIEWS)}
        if not state:
            raise CheckpointError(f"{where} lacks what its views, {config.name}, have measured")
        views.load_state(state)
    return views
