"""The bytes of a stored value that is encoded, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hpdist.data.files.named_files import Limits, NamedFile, too_large
from hpdist.data.files.retry import is_remote

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Unreadable:
    """Stands for a stored value that no spec accepts, and says why."""

    reason: str


def stored_bytes(value: Any, what: str, limits: Limits) -> bytes:
    """The bytes of a stored value, bytes, {bytes, path} or a NamedFile, which is read.

    Raises ValueError where there are none, or more than the limits allow; `what` it should have
    been is for the message.
    """
    if value is None:
        raise ValueError("the value is null")
    if isinstance(value, Unreadable):
        raise ValueError(value.reason)
    if isinstance(value, NamedFile):
        return value.read()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        if value.get("path"):  # no rule came with it
            raise ValueError(f"it names the file {value['path']!r}, which is not opened here")
        raise ValueError("it has neither bytes nor a path")
    if not isinstance(data, bytes):
        raise ValueError(f"it is {type(data).__name__}, not {what}")
    if len(data) > limits.bytes:
        raise too_large("the value", len(data), limits.bytes)
    return data


def mean_bytes(values: Sequence[Any]) -> float:
    """Give the mean size of encoded values; infinity where all are still in files of their own."""
    data = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    lengths = [len(value) for value in data if isinstance(value, bytes)]
    return sum(lengths) / len(lengths) if lengths else math.inf


def _path_of(value: Any) -> str | None:
    """The file that a stored value names, where it is one of files."""
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) and path else None


def is_elsewhere(value: Any) -> bool:
    """Whether a stored value names a file that lies on another machine."""
    path = _path_of(value)
    return path is not None and value.get("bytes") is None and is_remote(path)
