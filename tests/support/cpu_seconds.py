"""A pytest plugin that adds up the CPU seconds of every test, those of its processes included.

`pytest -p tests.support.cpu_seconds --cpu-seconds=FILE …` appends a line of JSON for each test.
Wall time says little on a machine that others use too. `python -m tests.benchmarks.durations FILE`
makes tables of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from multiprocessing.forkserver import _forkserver  # type: ignore[attr-defined]
from pathlib import Path

import pytest

TICKS = os.sysconf("SC_CLK_TCK")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="append every test's CPU seconds here")


def used() -> float:
    """Return the seconds of this process, of the server of ranks, and of what they started."""
    seconds = sum(os.times()[:4])
    server = getattr(_forkserver, "_forkserver_pid", None)
    if server is not None:
        try:
            fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return seconds
        seconds += sum(map(int, fields[11:15])) / TICKS
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before, began = used(), time.time()
    result = yield
    file = item.config.getoption("--cpu-seconds")
    if file:
        seconds = round(used() - before, 3)
        told = {"test": item.nodeid, "seconds": seconds, "began": began, "ended": time.time()}
        line = json.dumps(told)
        with Path(file).open("a") as out:  # one write: workers append to the same file
            out.write(line + "\n")
    return result
