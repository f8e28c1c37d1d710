"""A kind that was registered is found by its columns, and its views are told of its rows."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest

from hpdist.config.component import Component
from hpdist.data.decode.arrays import ArrayLayout
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import InputKind, Recognised, find_input, kind_named, register, registry
from hpdist.data.views import IdentityViews
from hpdist.errors import ConfigError
from hpdist.train.config import parse
from hpdist.train.fitting import fitted_views
from hpdist.train.input_choice import is_inputs_record, settle_inputs


@dataclass(frozen=True)
class DateSpec(InputSpec):
    kind: ClassVar[str] = "dates"
    view_arguments: ClassVar[tuple[Any, ...]] = ("a calendar",)

    @property
    def layout(self) -> ArrayLayout:
        return ArrayLayout((1,), np.dtype("float32"))


class Dates(InputKind):
    name = "dates"
    held = "days"

    def recognise(self, feature: Any) -> Recognised | None:
        found = getattr(feature, "dtype", "") == "date32"
        return Recognised("certain", self.held) if found else None

    def is_record(self, found: Any) -> bool:
        return bool(found.get("calendar", "julian") == "julian")


class DateViews(IdentityViews):
    def __init__(self, seed: int, *told: str) -> None:
        self.told = told


class DateViewsConfig(Component):
    kind: ClassVar[str] = "views"
    input_kind: ClassVar[str] = "dates"
    name: str

    def build(self, seed: int, *told: str) -> DateViews:
        return DateViews(seed, *told)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    register(Dates())


def rows() -> datasets.Dataset:
    days = [datetime.date(2020, 1, 1 + row) for row in range(8)]
    values = {"day": days, "age": [0.5] * 8, "label": [0, 1] * 4}
    return datasets.Dataset.from_dict(values)


def test_its_column_is_the_input_wherever_there_is_one() -> None:
    found = find_input(rows(), "label", "data.labeled", frozenset({"image"}))
    assert (found.kind, found.column) == ("dates", "day")
    assert found.lines == ("input: dates, the column 'day' (days) of data.labeled",)


@pytest.mark.parametrize("views", ["auto", {"name": "identity", "input_kind": "dates"}])
def test_its_views_are_those_that_change_nothing_unless_it_has_others(views: Any) -> None:
    values: dict[str, Any] = {"model": "mlp", "algorithm": "supervised", "steps": 1}
    config = parse(values | {"views": views, "data": {"labeled": {"path": "memory"}}})
    settled = settle_inputs(config, rows(), {})
    chosen: Any = settled.config.views
    assert (chosen.name, chosen.input_kind) == ("identity", "dates")
    assert settled.kind.find_columns(rows().features, settled.column, "data.labeled") == "day"


def test_views_of_its_own_are_told_of_its_rows() -> None:
    config = DateViewsConfig(name="python:dates:DateViewsConfig")
    made: Any = fitted_views(config, 0, DateSpec(), None, None, None)  # type: ignore[arg-type]
    assert made.told == DateSpec.view_arguments


def test_its_record_is_looked_at() -> None:
    assert is_inputs_record({"mode": "RGB", "calendar": "julian"})
    assert not is_inputs_record({"calendar": "maya"})
    assert not is_inputs_record({"mode": "CMYK"})


def test_a_kind_is_named_by_its_class_too() -> None:
    assert kind_named(f"python:{__name__}:Dates") is kind_named("dates")
    with pytest.raises(ConfigError, match="rows is no InputKind"):
        kind_named(f"python:{__name__}:rows")
