"""Run a function on N real gloo ranks, as `hpdist.testing.run_ranks` does, for the tests.

They are warm (tests/support/warm_ranks.py), unless a test asks for interpreters of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpdist import testing
from hpdist.testing.ranks import free_port
from tests.support.warm_ranks import IMPORTED, start_method

__all__ = ["free_port", "run_ranks"]


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
    start = start_method(fresh)
    return testing.run_ranks(function, ranks, *args, timeout=timeout, start=start, preload=IMPORTED)
