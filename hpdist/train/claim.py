"""A run's claim to its folder: no other run trains in it, and the state of the run in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpdist.checkpoint import reader as checkpoint
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.errors import CheckpointError
from hpdist.tracking.console import Console
from hpdist.tracking.run_folder import RunFolder
from hpdist.tracking.run_lock import RunLock
from hpdist.train.config import RunConfig
from hpdist.train.config_history import (
    begin_config,
    continue_config,
    describe_differences,
    differences,
)
from hpdist.train.facts import RunFacts

_TURN_SECONDS = 60.0  # the other ranks wait in a collective, which has its own timeout


class Claim:
    """The folder of a run, owned before anything is read there until the run's end.

    Args:
        config: Of the run.
        folder: Of the run.
        files: Whether anything is written; if not, the folder is neither owned nor read.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, files: bool) -> None:
        self._config = config
        self._folder = folder
        self._files = files
        self._lock: RunLock | None = None
        self._log = Console(0, 0, folder.main).log_line

    def open(self) -> checkpoint.SavedRun | None:
        """Own the folder, and find the checkpoint to continue from, if any. Collective.

        Raises CheckpointError, on all ranks, if another run uses it, cannot be written, or holds
        something that must not or cannot be continued.
        """
        if not self._files:
            return None
        call_on_all_ranks(self._folder.create)
        self._lock = own_folder(self._folder.path, self._config.run.wait, self._log)
        if self._config.checkpoint.resume == "never":
            run_on_main(self._folder.refuse_unless_empty)
            return None
        return checkpoint.open_newest(self._folder.checkpoints, self._log, facts=RunFacts)

    def summary(self, done: int) -> dict[str, Any] | None:
        """The summary of a run that has done this many steps, if these are all and it has ended."""
        if done < self._config.steps:
            return None
        summary = run_on_main(self._folder.read_summary)
        return summary if summary is not None and summary.get("steps") == done else None

    def log_done(self, config: RunConfig, steps: object) -> None:
        """Log that the run is done, and which settings differ from it. Collective."""
        found = run_on_main(lambda: differences(self._folder, config))
        others = (
            f"; changed settings have no effect ({describe_differences(found)}): raise steps to go "
            "with them, or choose another run.name"
        )
        self._log(
            f"nothing to do: the run in {self._folder.path} has done its {steps} steps"
            f"{others if found else ''}"
        )

    def begin(self, config: RunConfig, step: int | None) -> None:
        """Record the settings, or their differences if a run continues from a step.

        No other run of this process can take the folder from now on. Collective.
        """
        if self._lock is None:
            return
        self._lock.busy = True
        if step is None:
            call_on_all_ranks(lambda: begin_config(self._folder, config))
            return
        line = run_on_main(lambda: continue_config(self._folder, config, step))
        if line is not None:
            self._log(line)

    def lost(self) -> CheckpointError | None:
        """The error, on the first rank, if another run has taken the folder from this one."""
        if self._lock is None or self._lock.lost is None:
            return None
        return CheckpointError(
            f"the run folder {str(self._folder.path)!r} was taken by {self._lock.lost} while this "
            "run did not respond; this run ends and leaves the folder unchanged"
        )

    def release(self) -> None:
        """Release the folder; it is removed if it is empty."""
        if self._lock is not None:
            self._lock.release()
            self._folder.remove_empty()


def own_folder(folder: Path, seconds: float, log: Callable[[str], None]) -> RunLock:
    """Become the owner of a run folder, or wait for it this many seconds. Collective.

    Raises InUseError, on all ranks, if another run uses it all that time.
    """
    lock = RunLock(folder, log)
    if run_on_main(lambda: lock.acquire(0)):
        return lock
    if seconds:
        log(f"{run_on_main(lock.refusal)}; waiting {seconds:g} s for that")
    deadline = time.monotonic() + seconds
    while (left := run_on_main(lambda: deadline - time.monotonic())) > 0:
        turn = min(left, _TURN_SECONDS)
        if run_on_main(lambda: lock.acquire(turn)):  # noqa: B023
            return lock
    raise run_on_main(lock.refusal)
