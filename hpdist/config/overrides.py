"""The command line's `--key.sub value`, applied over the settings of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpdist.config.component import by_name, components
from hpdist.config.section import shown
from hpdist.config.yaml import parse_yaml
from hpdist.errors import ConfigError


def lay_over(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> None:
    """Set dotted keys in a nested dict, in any order: a group before its members.

    A component's name comes before its other options, and drops those of another component. A
    group that its name may replace is set by it: `--algorithm fixmatch`.
    """
    values.update({group: by_name(values[group]) for group in BY_NAME if group in values})
    named = [
        (f"{key}.name", value) if key in BY_NAME and isinstance(value, str) else (key, value)
        for key, value in overrides
    ]
    for key, value in sorted(
        named, key=lambda pair: (pair[0].count("."), pair[0] not in _COMPONENT_NAMES)
    ):
        _set(values, key, value)


def read_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Read `--key.sub value` and `--key.sub=value` as (dotted key, value). Raises ConfigError."""
    pairs = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(
                f"unexpected argument {argument!r}; settings have the form --key.sub value"
            )
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            pairs.append((key, parse_yaml(text)))
        except ConfigError as error:
            raise ConfigError(f"--{key}: {error}") from error.__cause__
    return pairs


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key. A new component `name` drops the old component's options."""
    *parents, last = dotted.split(".")
    node = values
    for parent in parents:
        child = {} if node.get(parent) is None else node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"--{dotted}: {parent!r} holds {shown(child)}, no group of settings")
        copy = dict(child)  # YAML anchors may share it between places
        node[parent], node = copy, copy
    if dotted in _COMPONENT_NAMES and not _is_of(parents[0], node, value):
        node.clear()
    node[last] = value


def _is_of(kind: str, options: Mapping[str, Any], name: object) -> bool:
    """Whether options belong to the component of this name; without a name, whether they fit."""
    if options.get("name") is not None:
        return bool(options["name"] == name)
    component = components(kind).get(str(name))
    return component is not None and not component.misfits({**options, "name": name})


_COMPONENT_NAMES = ("model.name", "algorithm.name", "views.name", "task.name")
BY_NAME = ("model", "algorithm", "views", "task", "optim", "schedule", "tracker")
"""Groups of settings that may be given by their name."""
