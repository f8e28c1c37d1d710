"""The page of all algorithms' and add-ons' options, made from their declarations.

`python -m hpdist.algorithms.reference > docs/algorithm-options.md` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import hpdist.algorithms  # noqa: F401  # registers all of them
from hpdist.algorithms.options import DeclaredConfig
from hpdist.config.component import components

_HEAD = """\
# Options of every algorithm

[All pages](../README.md#where-to-go) · [Glossary](glossary.md)

This page is written by `python -m hpdist.algorithms.reference` from the declarations in
`hpdist/algorithms`, and a test keeps it up to date. Options stand beside `name` in the config's
`algorithm`, those of add-ons beside their names in `addons`. [Choose an
algorithm](algorithms.md) says when to use which.
"""
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true, false",
    "null": "null",
    "string": "text",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return the page, in Markdown."""
    lines = [_HEAD, "## Algorithms", "", *_sections("algorithm")]
    return "\n".join([*lines, "## Add-ons", "", *_sections("addon")]).rstrip() + "\n"


def _sections(kind: str) -> Iterator[str]:
    for name, config in cast(dict[str, type[DeclaredConfig]], components(kind)).items():
        if not config.__module__.startswith("hpdist.algorithms."):
            continue  # registered by somebody else
        yield from (f"### `{name}`", "")
        made = config.declared_by
        paper = made.paper if kind == "algorithm" else made.addon_paper
        texts = [f"{paper}." if paper else "", " ".join((config.__doc__ or "").split())]
        yield from (" ".join(text for text in texts if text), "")
        rows = list(_rows(config))
        if rows:
            yield from ("| option | default | allowed | meaning |", "|---|---|---|---|")
            yield from (*rows, "")


def _rows(config: type[DeclaredConfig]) -> Iterator[str]:
    """One line of a table for each option."""
    for name, field in config.model_json_schema()["properties"].items():
        if name != "name":
            meaning = " ".join(field.get("description", "").split()).replace("|", r"\|")
            default = json.dumps(field["default"])
            yield f"| `{name}` | `{default}` | {_allowed(field)} | {meaning} |"


def _allowed(field: Mapping[str, Any]) -> str:
    """The allowed values, from the JSON Schema."""
    if "anyOf" in field:
        return " or ".join(_allowed(choice) for choice in field["anyOf"])
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of: {_allowed(field['items'])}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field]
    return ", ".join([_TYPES[field["type"]], *bounds])


if __name__ == "__main__":
    print(reference(), end="")
