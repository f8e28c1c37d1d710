"""For all tests: a core for each, or all cores where one needs them; a sample of the generic."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for what tests start

import pytest

from tests.support import sampling, turns
from tests.support.fault_table import TABLE, Fault

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that; `nohup`
# has a terminal's end ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Call what the sample of this run leaves out slow, unless tests are asked for by name."""
    for item in items:  # pytest-xdist wants every worker to find the same tests
        assert " at 0x" not in item.nodeid, f"a test is named by an address: {item.nodeid}"
    if config.getoption("keyword"):
        return
    for item in sampling.left_out(items, sampling.seed()):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test that is marked `alone` run while the other workers wait.

    What a command in the tests' own process leaves in the environment does not outlive the test.
    """
    from tests.support import warm_ranks  # late: imports of the tests set some of them

    before = warm_ranks.read_once()
    with turns.taken(item.config, alone=item.get_closest_marker("alone") is not None):
        try:
            return (yield)
        finally:
            warm_ranks.put_back(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the faults that this worker has injected to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [asdict(fault) for fault in TABLE.faults]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the faults that a worker has injected; one that has crashed hands over nothing."""
    for fault in getattr(node, "workeroutput", {}).get("faults", []):
        TABLE.faults.append(Fault(**fault))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a table of the faults, if any were injected."""
    if TABLE.faults:
        terminalreporter.section("faults")
        for line in TABLE.lines():
            terminalreporter.write_line(line)
