"""What a config leaves open of a run's inputs, chosen by the labelled rows: kind, views, columns.

What is chosen is in the config that the run keeps, and what only the rows told stays as it was when
a run goes on: `record_inputs` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from hpdist.config.component import Component
from hpdist.data.decode.stored_values import Column
from hpdist.data.files.named_files import PathRule
from hpdist.data.kinds import (
    DEFAULT_KIND,
    Facts,
    FoundInput,
    InputKind,
    find_input,
    kind_named,
    kind_names,
    kind_of_input,
    kind_of_views,
    kinds,
    usable_kind,
)
from hpdist.data.sources.labels import label_column
from hpdist.data.sources.loading import open_table
from hpdist.data.views import AutoViewsConfig, IdentityViewsConfig
from hpdist.errors import ConfigError
from hpdist.models.build import ModelConfig
from hpdist.train.config import RunConfig

_WHERE = "data.labeled"


@dataclass(frozen=True)
class Settled:
    """The labelled set as it was opened, and the settings with the views that it asks for."""

    config: RunConfig
    opened: tuple[Any, str, PathRule]
    """The table of labelled rows, its name for messages, and the files its rows may name."""
    kind: InputKind
    column: Column | None
    """Where the input is; None where the kind will say."""
    lines: tuple[str, ...] = ()
    """What was decided, for a person."""


def settle_inputs(config: RunConfig, dataset: Any, recorded: Mapping[str, Any]) -> Settled:
    """Open the labelled set; choose kind, views and columns where the config does not.

    `dataset` is one given in Python, `recorded` what `record_inputs` gave when the run began.
    Raises ConfigError or DataError, also where several columns would do.
    """
    source, loading = config.data.labeled, config.data.loading
    opened = open_table(source, dataset, _WHERE, (), loading, in_place=True)
    named = kind_of_views(config.views)
    found = _find(config, named, opened[0], recorded)
    if isinstance(config.views, AutoViewsConfig):
        assert found is not None
        kind = kind_named(found.kind)
        config = config.model_copy(update={"views": _views(kind, config.views)})
    else:
        kind = named or usable_kind(None if found is None else found.kind)
    if found is None:
        return Settled(config, opened, kind, None)
    if config.data.labeled.input is None and not isinstance(found.column, str):
        config = _with_columns(config, list(found.column))
    return Settled(config, opened, kind, found.column, found.lines)


def _find(
    config: RunConfig, named: InputKind | None, table: Any, recorded: Mapping[str, Any]
) -> FoundInput | None:
    """Find kind and columns, where the config leaves one of them open; else None.

    `named` is the kind that the views are for, if they are for one.
    """
    views, labeled = config.views, config.data.labeled
    label = label_column(table.features, labeled.label, _WHERE)
    auto = isinstance(views, AutoViewsConfig)
    if labeled.input is not None:
        column = labeled.input if isinstance(labeled.input, str) else tuple(labeled.input)
        if named is not None:
            return FoundInput(named.name, column)
        # Of a column that is no input: whoever takes pixels and numbers says what is wrong with it.
        return FoundInput(kind_of_input(table, column) or DEFAULT_KIND.name, column)
    joining = frozenset(kind.name for kind in kinds() if kind.joins_columns)
    if recorded.get("columns"):
        return FoundInput(min(joining), tuple(recorded["columns"]))
    if auto:
        return find_input(table, label, _WHERE, _takes(config.model))
    if named is not None:
        return find_input(table, label, _WHERE, joining) if named.joins_columns else None
    if isinstance(views, IdentityViewsConfig):
        return find_input(table, label, _WHERE, joining)
    return None


def _takes(model: Component) -> frozenset[str]:
    """The kinds of input that a model can be built for; one of the user's own may take any."""
    return model.takes if isinstance(model, ModelConfig) else kind_names()


def _views(kind: InputKind, views: AutoViewsConfig) -> Component:
    """Make the views of a kind, with the options that were given."""
    try:
        return kind.default_views(views.options)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"views: the column of data.labeled asks for {kind.setting}, which refuses the options "
            f"given: {'; '.join(found)}"
        ) from None


def _with_columns(config: RunConfig, columns: list[str]) -> RunConfig:
    labeled = config.data.labeled.model_copy(update={"input": columns})
    data = config.data.model_copy(update={"labeled": labeled})
    return config.model_copy(update={"data": data})


def record_inputs(config: RunConfig, given: RunConfig, facts: Facts) -> dict[str, Any]:
    """What a run that goes on must keep of how its inputs are decoded, as JSON.

    `given` are the settings as they were before anything was chosen, `facts` what the rows told.
    """
    found = dict(facts.values)
    if given.data.labeled.input is None and isinstance(config.data.labeled.input, list):
        found["columns"] = config.data.labeled.input
    return found


def is_inputs_record(found: Any) -> bool:
    """Whether JSON is what a run keeps of its inputs."""
    return isinstance(found, dict) and all(kind.is_record(found) for kind in kinds())
