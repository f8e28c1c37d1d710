"""A file behind the server with faults, and how tests read it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hpdist.data.files.open import Retry, read_range
from tests.support.fault_server import FaultServer

SIZE = 1_000_000
CONTENT = random.Random(0).randbytes(SIZE)
QUICK = Retry(deadline=4, first_wait=0.05, max_wait=0.2, stall=0.5)
NAME = "a.bin"


def read(
    server: FaultServer, start: int = 0, end: int = SIZE, retry: Retry = QUICK, **kwargs: Any
) -> bytes:
    """Read a range of the file."""
    return read_range(server.url(NAME), start, end, retry, **kwargs)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give the lines that reading has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "hpdist.data"]
