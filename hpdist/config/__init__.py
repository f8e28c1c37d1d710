"""The base of the config: sections, components, overrides and YAML, without any component."""

from __future__ import annotations

from hpdist.aliases import find_moved


def __getattr__(name: str) -> object:
    """Find names that `hpdist.config` held when it was one module."""
    return find_moved(__name__, name)
