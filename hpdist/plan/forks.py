"""Forks of this process, a few at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NoReturn

from hpdist.processes import end_with

_LOOK_SECONDS = 0.02


class Forks:
    """Runs functions in forks of this process, so that what it has imported is there at once.

    A fork ends with its parent. This process must have begun no thread that holds a lock, and
    used no GPU.

    Args:
        at_once: The most that run at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self.running: set[int] = set()
        """The process ids of those that have not ended."""
        self.ended: dict[int, int] = {}
        """The exit status of each of the others, negative where a signal ended it."""
        self.most = 0
        """The most that ran at the same time."""

    def start(self, function: Callable[[], NoReturn]) -> int:
        """Run a function, which ends its process, in a fork; wait where too many run already.

        Gives the process id.
        """
        while len(self.running) >= self._at_once:
            self.wait(_LOOK_SECONDS)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                end_with(parent)
                function()
            finally:
                os._exit(1)
        self.running.add(pid)
        self.most = max(self.most, len(self.running))
        return pid

    def wait(self, seconds: float) -> None:
        """Note which have ended, and wait a little."""
        for pid in list(self.running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == pid:
                self.running.remove(pid)
                self.ended[pid] = os.waitstatus_to_exitcode(status)
        if self.running:
            time.sleep(seconds)

    def wait_all(self) -> None:
        """Wait until all have ended."""
        while self.running:
            self.wait(_LOOK_SECONDS)
