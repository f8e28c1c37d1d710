"""Reads a config file, and the command line's `--key.sub value` over it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpdist.errors import ConfigError
from hpdist.settings import by_name, components, shown


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write settings as `read_yaml` reads them."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def lay_over(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> None:
    """Set dotted keys in a nested dict: whatever their order, a group before what is in it.

    A component's name comes before its other options, and drops those of another component. A
    group whose name may stand for it is taken by that: `--algorithm fixmatch`.
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        from hpdist.data.paths import did_you_mean  # imports what a config without errors needs not

        raise ConfigError(
            f"cannot read the config {str(path)!r}: {error.strerror}{did_you_mean(str(path))}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: it is not UTF-8 text") from error
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(values, dict):
        found = "it is empty" if values is None else f"not {shown(values)}"
        raise ConfigError(f"{path} must hold settings such as `steps: 1000`; {found}")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"


def read_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Read `--key.sub value` and `--key.sub=value` as (dotted key, value). Raises ConfigError."""
    pairs = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; settings read --key.sub value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.load(text, _Loader)))
        except yaml.YAMLError as error:
            problem = f"--{key}: {text!r} is not valid YAML: {_yaml_problem(error)}"
            raise ConfigError(problem) from error
    return pairs


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key. A new component `name` drops the old component's options."""
    *parents, last = dotted.split(".")
    node = values
    for parent in parents:
        child = {} if node.get(parent) is None else node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"--{dotted}: {parent!r} holds {shown(child)}, no group of settings")
        copy = dict(child)  # an anchor of the file may be used in two places
        node[parent], node = copy, copy
    if dotted in _COMPONENT_NAMES and not _is_of(parents[0], node, value):
        node.clear()
    node[last] = value


def _is_of(kind: str, options: Mapping[str, Any], name: object) -> bool:
    """Whether options are those of the component of this name; unnamed ones, if it has such."""
    if options.get("name") is not None:
        return bool(options["name"] == name)
    component = components(kind).get(str(name))
    return component is not None and not component.misfits({**options, "name": name})


_COMPONENT_NAMES = ("model.name", "algorithm.name", "views.name")
BY_NAME = ("model", "algorithm", "views", "task", "optim", "schedule", "tracker")
"""Groups of settings that a text, their name, may stand for."""


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, 007 and dates are text, no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"{name!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)$",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [r for r in resolvers if not r[0].endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789")
        )
