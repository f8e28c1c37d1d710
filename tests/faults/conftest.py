"""What the tests of faults share; at the end of the session `tests/conftest.py` prints a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpdist.data.files import retry as retrying
from tests.support.fault_server import FaultServer
from tests.support.fault_table import TABLE, Fault
from tests.support.served_file import CONTENT, NAME


@pytest.fixture(scope="session")
def inject() -> Callable[..., Fault]:
    """Note faults of a kind that a test injects; what comes back is told when they are survived."""
    return TABLE.inject


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    """Serve `CONTENT` under `NAME`."""
    (tmp_path / NAME).write_bytes(CONTENT)
    with FaultServer(tmp_path) as server:
        yield server


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> None:
    """Record all lines of the log, as of a process that has logged none."""
    caplog.set_level(logging.INFO)
    retrying._noticed.clear()
