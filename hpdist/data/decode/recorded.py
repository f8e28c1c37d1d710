"""Specs as JSON: what a model's folder keeps of how its inputs are decoded."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from hpdist.errors import DataError, describe

T = TypeVar("T")


def recorded(spec: Any) -> dict[str, Any]:
    """Give the fields of a dataclass as JSON, and under `class` the name of its class.

    Raises DataError where it is no dataclass, or a field is no JSON.
    """
    kind = type(spec)
    if not dataclasses.is_dataclass(spec):
        raise DataError(f"{kind.__name__} is no dataclass, so a model's folder cannot keep it")
    values = dataclasses.asdict(typing.cast(Any, spec))
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
    except TypeError as error:
        raise DataError(
            f"{kind.__name__} has fields that are no plain values, so a model's folder cannot keep "
            f"them: {error}; define its method `record`"
        ) from error
    return {"class": f"python:{kind.__module__}:{kind.__qualname__}", **plain}


def restored(kind: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Make a dataclass of recorded fields; `others` are fields that were made before.

    Lists become tuples. Raises ValueError where the values are not those of the class.
    """
    names = {field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.init}
    given = {name: _frozen(value) for name, value in values.items() if name != "class"} | others
    foreign = sorted(given.keys() - names)
    if foreign:
        raise ValueError(f"{kind.__name__} has no field {foreign[0]!r}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {describe(error)}") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
