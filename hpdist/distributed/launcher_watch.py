"""Notices that a rank's launcher has ended: when killed, it cannot end the ranks that it started.

Each rank that torchrun or Accelerate starts has a session of its own, so nothing else would end it:
it would hold its GPU and train on, beside the run that a scheduler has started in its place.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpdist.errors import DistributedError

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 25.0  # for the step to end and the run to be saved
ELASTIC = "TORCHELASTIC_RUN_ID"
"""The variable that torchrun sets in every rank, and Accelerate if it starts several."""
_PROGRAMS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "deepspeed.launcher.launch",
}
"""Programs that start ranks without that variable, as a file or as a module."""
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
"""Python's own options that take an argument."""


@dataclass(frozen=True)
class Launcher:
    """A launcher, seen from one of its ranks."""

    pid: int
    child: psutil.Process
    """The process that it started: the rank, or a script around the rank."""

    def gone(self) -> bool:
        """Whether it has ended, even if its parent has not collected its status."""
        try:
            return bool(self.child.ppid() != self.pid)
        except psutil.NoSuchProcess:
            return True


def find_launcher() -> Launcher | None:
    """The launcher of this rank; None if a person or a script started it."""
    run = os.environ.get(ELASTIC)
    child = psutil.Process()
    try:
        while (parent := child.parent()) is not None:
            found = _launches(parent) if run is None else not _is_within(parent, run)
            if found:
                return Launcher(parent.pid, child)
            child = parent
    except psutil.Error:  # it ended meanwhile, or belongs to another user
        return None
    return None


def _is_within(process: psutil.Process, run: str) -> bool:
    """Whether the launcher started this process too: a script around the rank."""
    try:
        return bool(process.environ().get(ELASTIC) == run)
    except psutil.AccessDenied:
        return False


def _launches(process: psutil.Process) -> bool:
    return _program(process.cmdline()) in _PROGRAMS


def _program(command: list[str]) -> str:
    """What a command line runs: a program, or the script or module given to Python.

    Later arguments do not count: an editor may have opened a folder named like a launcher.
    """
    words = iter(command)
    name = Path(next(words, "")).name
    if not name.startswith("python"):
        return name
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word == "-m":
            return next(words, "")
        elif not word.startswith("-"):
            return Path(word).name
        elif not word.startswith("--") and "c" in word[1:]:
            return name  # its code is the next argument
    return name


class LauncherWatch:
    """Watches the launcher from construction until `stop`, if there is one.

    Once it has ended, `gone` is true, so that the run can be saved and stopped; a process that has
    not ended by itself within 25 seconds is killed.

    Args:
        rank: This rank.
        grace: Those seconds; 0 where there is nothing to save.
    """

    def __init__(self, rank: int, grace: float = _GRACE_SECONDS) -> None:
        self.gone = False
        """Whether the launcher has ended before this rank."""
        self._rank = rank
        self._grace = grace
        self._stop = threading.Event()
        launcher = find_launcher()
        if launcher is not None:
            threading.Thread(
                target=self._watch, args=(launcher,), name="hpdist-launcher", daemon=True
            ).start()

    def stop(self) -> None:
        """Stop watching; if the launcher has already ended, the time limit stays."""
        self._stop.set()

    def _watch(self, launcher: Launcher) -> None:
        while not launcher.gone():
            if self._stop.wait(_LOOK_SECONDS):
                return
        self._write_state(launcher)
        self.gone = True
        # By the system, since an interpreter that is stuck or shutting down runs no thread.
        signal.alarm(int(self._grace) + 2)
        threading.Event().wait(self._grace)
        os._exit(DistributedError.exit_status)

    def _write_state(self, launcher: Launcher) -> None:
        what = f"the run is saved and stops, within {self._grace:g} s"
        line = (
            f"hpdist: rank {self._rank}: the launcher (process {launcher.pid}) is gone; "
            f"{what if self._grace else 'this process ends'}\n"
        )
        try:
            os.write(2, line.encode())
        except OSError:  # the reader of the output has ended as well
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
