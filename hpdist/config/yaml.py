"""YAML as people expect it, for reading and writing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpdist.config.section import shown
from hpdist.errors import ConfigError


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write settings as `read_yaml` reads them."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
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


def parse_yaml(text: str) -> Any:
    """Read one value, such as one of the command line. Raises ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not valid YAML: {_yaml_problem(error)}") from error


class _Loader(yaml.SafeLoader):
    """Reads YAML as people expect it: 1e-3 is a number, 007 and dates are text, keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                problem = f"{name!r} occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would not read as text."""


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
