"""What a config leaves open of a run's inputs, chosen by the labelled rows: views, columns, length.

What is chosen is in the config that the run keeps, and what only the rows told stays as it was when
a run goes on: `record_inputs` writes it down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from hpdist.config.component import Component, ComponentOf
from hpdist.data.decode.audio import length_of
from hpdist.data.decode.categories import Categories, find_categories
from hpdist.data.decode.kinds import KINDS, FoundInput, Kind, find_input, kind_of_input
from hpdist.data.decode.stored_values import InputSpec
from hpdist.data.files.named_files import PathRule
from hpdist.data.sources.held_out import is_elsewhere
from hpdist.data.sources.labeled import LabeledRows, UnlabeledTable
from hpdist.data.sources.labels import label_column
from hpdist.data.sources.loading import names_of, open_table
from hpdist.data.sources.unlabeled import AnyUnlabeled, MixedRows
from hpdist.data.views import (
    AudioViewsConfig,
    AutoViewsConfig,
    IdentityViewsConfig,
    TableViewsConfig,
)
from hpdist.errors import ConfigError, DataError
from hpdist.models.build import ModelConfig
from hpdist.train.config import RunConfig

_WHERE = "data.labeled"
_LONGEST = 10.0  # seconds of a row, where nobody says how long it is
_MOST = 1000  # sounds whose headers are read for that
_MOST_REMOTE = 16
_SECONDS = 5.0  # that it may take
_AT_ONCE = 16  # rows


@dataclass(frozen=True)
class Settled:
    """The labelled set as it was opened, and the settings with the views that it asks for."""

    config: RunConfig
    opened: tuple[Any, str, PathRule]
    """The table of labelled rows, its name for messages, and the files its rows may name."""
    lines: tuple[str, ...] = ()
    """What was decided, for a person."""


def settle_inputs(config: RunConfig, dataset: Any, recorded: Mapping[str, Any]) -> Settled:
    """Open the labelled set; choose views and columns where the config does not.

    `dataset` is one given in Python, `recorded` what `record_inputs` gave when the run began.
    Raises ConfigError or DataError, also where several columns would do.
    """
    opened = open_table(config.data.labeled, dataset, _WHERE, (), config.data.loading)
    found = _find(config, opened[0], recorded)
    if found is None:
        return Settled(config, opened)
    if isinstance(config.views, AutoViewsConfig):
        config = config.model_copy(update={"views": _views(found.kind, config.views)})
    if config.data.labeled.input is None and not isinstance(found.column, str):
        config = _with_columns(config, list(found.column))
    return Settled(config, opened, found.lines)


def _find(config: RunConfig, table: Any, recorded: Mapping[str, Any]) -> FoundInput | None:
    """Find kind and columns, where the config leaves one of them open; else None."""
    views, labeled = config.views, config.data.labeled
    label = label_column(table.features, labeled.label, _WHERE)
    if labeled.input is not None:
        if not isinstance(views, AutoViewsConfig):
            return None
        # Of a column that is no input: the views of images say what is wrong with it.
        column = labeled.input if isinstance(labeled.input, str) else tuple(labeled.input)
        return FoundInput(kind_of_input(table, column) or "image", column)
    if recorded.get("columns"):
        return FoundInput("table", tuple(recorded["columns"]))
    if isinstance(views, AutoViewsConfig):
        return find_input(table, label, _WHERE, _takes(config.model))
    if isinstance(views, (TableViewsConfig, IdentityViewsConfig)):
        return find_input(table, label, _WHERE, frozenset({"table"}))
    return None


def _takes(model: Component) -> frozenset[str]:
    """The kinds of input that a model can be built for; one of the user's own may take any."""
    return model.takes if isinstance(model, ModelConfig) else frozenset(KINDS)


def _views(kind: Kind, views: AutoViewsConfig) -> Component:
    """Make the views of a kind, with the options that were given."""
    try:
        return ComponentOf("views").choose({**views.options, "name": kind})
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"views: the column of data.labeled asks for views.name: {kind}, which refuses the "
            f"options given: {'; '.join(found)}"
        ) from None


def _with_columns(config: RunConfig, columns: list[str]) -> RunConfig:
    labeled = config.data.labeled.model_copy(update={"input": columns})
    data = config.data.model_copy(update={"labeled": labeled})
    return config.model_copy(update={"data": data})


def find_row_categories(rows: LabeledRows, recorded: Mapping[str, Any]) -> Categories | None:
    """The categories of the labelled set's columns, as they were when the run began.

    They are those of all rows of the split, whether these are used or not. Raises DataError.
    """
    if isinstance(rows.column, str):
        return None
    if "categories" in recorded:
        kept = Categories.recorded(recorded["categories"])
        if kept.columns != rows.column:
            raise DataError(
                f"{_WHERE}.input: the run that goes on began with the columns "
                f"{', '.join(kept.columns)}; name these, or choose another run.name"
            )
        return kept
    return find_categories(rows.dataset, rows.column, rows.name)


def widen_categories(
    spec: InputSpec, unlabeled: AnyUnlabeled | None, recorded: Mapping[str, Any]
) -> Categories | None:
    """Add the categories of unlabelled rows in tables; those of a run that goes on stay."""
    found = spec.categories
    if found is None or "categories" in recorded:
        return found
    for part in _tables(unlabeled):
        found = found.widened(part.dataset, names_of(part.column), part.name)
    return found


def describe_categories(
    categories: Categories, sets: Mapping[str, LabeledRows | AnyUnlabeled | None]
) -> list[str]:
    """Say what becomes of categories, and which rows of which sets have a value that is none."""
    said = [categories.line()]
    for name, rows in sets.items():
        parts = [rows] if isinstance(rows, LabeledRows) else _tables(rows)
        for part in parts:
            said += categories.strangers(part.dataset, names_of(part.column), name)
        if rows is not None and not parts:
            said.append(
                f"note: {name} is a stream, and not read for its categories: a value that no row "
                "of data.labeled has is none of its column's, all 0; streaming: false adds those "
                "of a table"
            )
    return said


def _tables(rows: LabeledRows | AnyUnlabeled | None) -> list[UnlabeledTable]:
    parts = rows.parts if isinstance(rows, MixedRows) else (rows,)
    return [part for part in parts if isinstance(part, UnlabeledTable)]


def find_seconds(
    config: RunConfig, rows: LabeledRows, recorded: Mapping[str, Any]
) -> tuple[float, str] | None:
    """How long rows of sound are, where the config does not say, and a line about it.

    None where there is nothing to find out. Raises ConfigError where sound cannot be read here, and
    DataError where no file tells.
    """
    views = config.views
    if not isinstance(views, AudioViewsConfig) or views.seconds is not None:
        return None
    if "seconds" in recorded:
        seconds = float(recorded["seconds"])
        return seconds, f"views.seconds: {seconds:g}, as the run began"
    _sampled(views, _LONGEST).sampling.require()
    lengths = _lengths(rows)
    if not lengths:
        raise DataError(
            f"{rows.name}: no sound of its first rows says how long it is, such as "
            f"{rows.describe(int(rows.ids[0]))}; mend them, or set views.seconds"
        )
    longest = max(lengths)
    seconds = min(_LONGEST, max(0.01, math.ceil(longest * 100) / 100))
    line = f"views.seconds: {seconds:g}, by the longest of {len(lengths)} labelled sounds"
    if longest > _LONGEST:
        line += f", which lasts {longest:.1f} s; what is longer is cut off"
    return seconds, line


def _lengths(rows: LabeledRows) -> list[float]:
    """Read how long the labelled sounds last, or many of them, spread evenly."""
    began = time.monotonic()
    remote = is_elsewhere(rows.read(np.zeros(1, np.int64))[0])
    count = min(len(rows), _MOST_REMOTE if remote else _MOST)
    places = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    found: list[float] = []
    for start in range(0, count, _AT_ONCE):
        lengths = map(length_of, rows.read(places[start : start + _AT_ONCE]))
        found += [length for length in lengths if length]
        if found and time.monotonic() - began > _SECONDS:
            break
    return found


def with_seconds(config: RunConfig, seconds: float) -> RunConfig:
    """Fill in how long rows of sound are; raises ConfigError where other options forbid it."""
    views = config.views
    assert isinstance(views, AudioViewsConfig)
    return config.model_copy(update={"views": _sampled(views, seconds)})


def _sampled(views: AudioViewsConfig, seconds: float) -> AudioViewsConfig:
    try:
        return AudioViewsConfig.model_validate({**views.model_dump(), "seconds": seconds})
    except ValidationError as error:
        found = "; ".join(detail["msg"] for detail in error.errors())
        raise ConfigError(f"views: with seconds: {seconds:g}, {found}") from None


def record_inputs(config: RunConfig, given: RunConfig, spec: InputSpec) -> dict[str, Any]:
    """What a run that goes on must keep of how its inputs are decoded, as JSON.

    `given` are the settings as they were before anything was chosen.
    """
    found: dict[str, Any] = {} if spec.mode is None else {"mode": spec.mode}
    if spec.categories is not None:
        found["categories"] = spec.categories.record()
    if given.data.labeled.input is None and isinstance(config.data.labeled.input, list):
        found["columns"] = config.data.labeled.input
    if isinstance(config.views, AudioViewsConfig) and getattr(given.views, "seconds", None) is None:
        found["seconds"] = config.views.seconds
    return found
