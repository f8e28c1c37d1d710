"""Objects that Python code may give `Trainer` instead of names: modules, algorithms, rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm, AlgorithmConfig
from hpdist.config.component import IN_PYTHON, Component, components
from hpdist.config.section import Section
from hpdist.data.sources.in_memory import DICTS, IN_MEMORY, ROWS, kind_of_value, table_of
from hpdist.errors import ConfigError
from hpdist.train.checks import check_given_model

_ALGORITHMS = (
    "a name such as 'fixmatch', settings such as {'name': 'fixmatch', 'threshold': 0.9} or an "
    "object such as hpdist.FixMatch(threshold=0.9)"
)


@dataclass
class InMemoryInputs:
    """Objects that Python code gave instead of names in the config."""

    model: nn.Module | None = None
    algorithm: Algorithm | None = None
    labeled: Any = None
    unlabeled: Any = None
    test: Any = None
    validation: Any = None


class GivenAlgorithm(AlgorithmConfig):
    """Stands for an algorithm that is a Python object, which holds its options."""

    name: Literal["python:(given)"]
    type: str
    """The class of the object."""
    _algorithm: Algorithm

    @classmethod
    def of(cls, algorithm: Algorithm) -> GivenAlgorithm:
        """Make the config of an object."""
        kind = type(algorithm)
        config = cls(name=IN_PYTHON, type=f"{kind.__module__}.{kind.__qualname__}")
        config._algorithm = algorithm
        return config

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Algorithm:
        """Return the object, with its tensors on `device`."""
        for name, value in vars(self._algorithm).items():
            if isinstance(value, Tensor):
                setattr(self._algorithm, name, value.to(device))
            elif isinstance(value, dict):
                for key, part in value.items():
                    value[key] = part.to(device) if isinstance(part, Tensor) else part
        return self._algorithm


def check_classes(algorithm: Algorithm | None, num_classes: int) -> None:
    """Raise ConfigError if a given algorithm was made for another number of classes."""
    made_for = getattr(algorithm, "num_classes", num_classes)
    if made_for != num_classes:
        raise ConfigError(
            f"algorithm: {type(algorithm).__name__} was made for num_classes={made_for}, but the "
            f"labelled data have {num_classes} classes"
        )


def algorithm_given(value: Any, objects: InMemoryInputs) -> dict[str, Any] | Component:
    """Return the settings of an algorithm, however it was given; an object goes into `objects`.

    An object of hpdist's classes becomes settings; any other is used itself. Raises ConfigError.
    """
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, AlgorithmConfig):
        return value
    if isinstance(value, type) and issubclass(value, AlgorithmConfig):
        return cast(Component, cast(Any, value)())
    if isinstance(value, type) and issubclass(value, Algorithm):
        candidates = _configs_of(value)
        if candidates:
            return {"name": candidates[0]}
        value = _called(value)
    if isinstance(value, Algorithm):
        objects.algorithm = value
        return _options_of(value) or GivenAlgorithm.of(value)
    raise ConfigError(f"algorithm: must be {_ALGORITHMS}, not {kind_of_value(value)}")


def _configs_of(kind: type[Algorithm]) -> list[str]:
    """The names of the configs that make this very class."""
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    return [name for name, config in configs.items() if config.declared_by is kind]


def _called(kind: type[Algorithm]) -> Algorithm:
    try:
        return kind()
    except TypeError as error:
        raise ConfigError(
            f"algorithm: {kind.__name__} is a class that needs arguments ({error}); give an object "
            f"of it, {kind.__name__}(…)"
        ) from error


def _options_of(algorithm: Algorithm) -> dict[str, Any] | None:
    """The settings that make an algorithm equal to this one, if there are any."""
    options = algorithm.settings()
    if options is None:
        return None
    for name in _configs_of(type(algorithm)):
        try:
            config = type(algorithm).Config.model_validate(options | {"name": name})
            same = config.build(getattr(algorithm, "num_classes", 2))
        except (ValueError, ConfigError):
            continue
        if _equal(vars(same), vars(algorithm)):
            return cast(dict[str, Any], config.model_dump())
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (bool, int, float, str, tuple, list, type(None))):
        return type(one) is type(other) and bool(one == other)
    return type(one) is type(other) and _equal(getattr(one, "__dict__", {}), vars(other))


def model_given(value: Any, objects: InMemoryInputs) -> dict[str, Any] | Component:
    """Return the settings of a model, however it was given; a module goes into `objects`."""
    if isinstance(value, nn.Module):
        check_given_model(value)
        objects.model = value
        return {"name": IN_PYTHON}
    if isinstance(value, Component):
        return value
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(
        "model: must be a torch.nn.Module, a name such as 'mlp' or settings such as {'name': "
        f"'mlp', 'hidden': [8]}}, not {kind_of_value(value)}"
    )


def rows_given(name: str, value: Any, objects: InMemoryInputs) -> dict[str, Any]:
    """Return the settings of a set, however it was given; rows in memory go into `objects`."""
    columns: Mapping[str, Any] = {}
    if isinstance(value, tuple):
        if len(value) != 2 or not isinstance(value[1], Mapping):
            raise ConfigError(f"{name}: must be {ROWS}, not a tuple of {len(value)}")
        value, columns = value
    if isinstance(value, (str, os.PathLike)):
        return {"path": os.fspath(value), **columns}
    if isinstance(value, Section):
        return value.model_dump(exclude_unset=True) | dict(columns)
    if isinstance(value, Mapping) and not isinstance(value, DICTS):
        return {**value, **columns}
    setattr(objects, name, table_of(name, value))
    return {"path": IN_MEMORY, **columns}
