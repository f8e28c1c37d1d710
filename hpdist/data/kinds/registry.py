"""The kinds of input that are known, by name."""

from __future__ import annotations

from hpdist.config.component import PYTHON_PREFIX, import_object
from hpdist.data.kinds.base import InputKind
from hpdist.errors import ConfigError

_kinds: dict[str, InputKind] = {}


def register(kind: InputKind) -> InputKind:
    """Make a kind known under its name, and give it back.

    Where several kinds recognise a column alike, the one that was registered first has it.
    """
    _kinds[kind.name] = kind
    return kind


def kinds() -> list[InputKind]:
    """Give all kinds that are known, in the order in which they were registered."""
    return list(_kinds.values())


def kind_names() -> frozenset[str]:
    """Give the names of all kinds that are known."""
    return frozenset(_kinds)


def kind_named(name: str) -> InputKind:
    """Give the kind of a name, or the one that `python:module:Class` is; that is registered then.

    Raises ConfigError where there is none.
    """
    if name.startswith(PYTHON_PREFIX):
        found = import_object(name)
        kind = found() if isinstance(found, type) and issubclass(found, InputKind) else found
        if not isinstance(kind, InputKind):
            raise ConfigError(f"{name} is no InputKind, nor a class of these")
        return _kinds.get(kind.name) or register(kind)
    if name not in _kinds:
        raise ConfigError(
            f"no kind of input is called {name!r}; known: {', '.join(_kinds)}, or "
            "python:package.module:attribute"
        )
    return _kinds[name]
