"""Run a function on N real gloo ranks, as `hpdist.testing.run_ranks` does, for the tests.

HPDIST_TEST_START=spawn gives each rank an interpreter of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hpdist import testing
from hpdist.testing.ranks import free_port

__all__ = ["free_port", "run_ranks"]

# Read by what the server has imported, when it was imported.
_READ_ONCE = (
    "DS_",
    "HF_",
    "HUGGINGFACE_",
    "LD_",
    "MALLOC_",
    "PYTHON",
    "TORCH_CPP",
    "TRANSFORMERS_",
)


def _read_once() -> dict[str, str]:
    return {name: v for name, v in os.environ.items() if name.startswith(_READ_ONCE)}


_SERVER = _read_once()


def _start_method(fresh: bool) -> str:
    """How ranks start: from the server, unless its imports have read another environment."""
    if fresh or _read_once() != _SERVER:
        return "spawn"
    return os.environ.get("HPDIST_TEST_START", "forkserver")


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300,
    fresh: bool = False,
) -> list[Any]:
    """Call a top-level function on every rank; results in rank order. A failing rank fails all.

    `fresh` ranks have an interpreter of their own: where a test measures their memory, or captures
    what they print, which the server's ranks print where it was started.
    """
    return testing.run_ranks(
        function,
        ranks,
        *args,
        timeout=timeout,
        start=_start_method(fresh),
        preload=("hpdist.train.trainer", "sklearn.datasets"),
    )
