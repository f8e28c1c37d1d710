"""The choice of how a path is read: as a local file, over HTTP or through fsspec."""

from __future__ import annotations

from hpdist.data.files.retry import FileVersion, is_remote
from hpdist.data.files.source import Local, Source
from hpdist.data.files.stores import Store
from hpdist.data.files.web import Hub, Web


def source_of(path: str, version: FileVersion | None) -> Source:
    """Choose how a path is read."""
    if not is_remote(path):
        return Local(path, version)
    kinds: dict[str, type[Source]] = {"http": Web, "https": Web, "hf": Hub}
    kind = Store if "::" in path else kinds.get(path.partition("://")[0].lower(), Store)
    return kind(path, version)
