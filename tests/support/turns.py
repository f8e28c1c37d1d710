"""Turns that the workers of pytest-xdist take: many run tests at once, or one runs a test alone."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def taken(config: pytest.Config, *, alone: bool) -> Iterator[None]:
    """Hold this worker's turn, alone or along with others; without workers, do nothing."""
    if not hasattr(config, "workerinput"):
        yield
        return
    own = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    with held(own.parent / "turn", alone=alone):
        yield


@contextmanager
def held(file: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock that one holds alone or many share, given in the order in which they asked."""
    with Path(f"{file}-gate").open("w") as gate, file.open("w") as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)  # who waits to be alone keeps it, and nobody gets past
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)  # what the test has forked holds the file open, too
