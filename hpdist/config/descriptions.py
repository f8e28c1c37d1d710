"""The docstrings under the fields of settings, read when the JSON Schema is made.

Pydantic can read them too (`use_attribute_docstrings`), but when a class is made: half of the time
that importing all of hpdist's components takes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any


def attribute_docstrings(kind: type[Any]) -> dict[str, str]:
    """The docstring under every annotated attribute of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is not object:
            found |= _own(base)
    return found


def add_descriptions(kind: type[Any], schema: dict[str, Any]) -> None:
    """Describe the properties of a class's JSON Schema by its docstrings."""
    properties = schema.get("properties", {})
    texts = getattr(kind, "setting_docstrings", lambda: attribute_docstrings(kind))()
    for name, text in texts.items():
        if name in properties:
            properties[name].setdefault("description", text)


@cache  # a hundred kinds of settings inherit from the same few, whose source is long
def _own(kind: type[Any]) -> dict[str, str]:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # it has no source file
        return {}
    (made,) = ast.parse(textwrap.dedent(source)).body
    if not isinstance(made, ast.ClassDef):
        return {}
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(made.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
