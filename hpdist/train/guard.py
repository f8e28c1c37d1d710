"""Handling of signals that ask a run to stop, and a watchdog for hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from hpdist.distributed.collectives import reports
from hpdist.distributed.launcher_watch import ELASTIC, LauncherWatch
from hpdist.distributed.watchdog import Watchdog
from hpdist.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
_LAUNCHER_GONE = "the end of the launcher"


class RunGuard:
    """Inside, signals that ask the run to stop are noted, and a hang ends the run.

    These are SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C). Repetitions have no effect, since
    schedulers and launchers often send several, except a second SIGINT, which ends the process at
    once, or in a notebook raises KeyboardInterrupt. torchrun passes a second Ctrl-C on as SIGTERM,
    so under it a SIGTERM after SIGINT ends the process too. SIGHUP and SIGINT stay ignored if they
    are, as under `nohup` or in a shell's background job; the others do not, since a launcher
    that ignores SIGUSR1 itself (`launch/slurm.sbatch`) passes that on to the ranks.

    Args:
        rank: This rank.
        seconds: How long a step may take; `None` disables the watchdog.
        launcher: Knows whether the launcher has ended, which also asks the run to stop.
    """

    def __init__(
        self, rank: int, seconds: float | None, launcher: LauncherWatch | None = None
    ) -> None:
        self.received: str | None = None
        """The signal that asked this rank to stop."""
        self._rank = rank
        self._watchdog = Watchdog(rank, seconds)
        self._launcher = launcher
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RunGuard:
        if threading.current_thread() is threading.main_thread():  # else Python allows no handlers
            heard = [s for s in _SIGNALS if not _stays_as_it_is(s)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        self._watchdog.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watchdog.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def heartbeat(self, step: int, doing: str) -> None:
        """Report progress."""
        self._watchdog.heartbeat(step, doing)

    def stopping(self) -> bool:
        """Whether a signal, or the end of its launcher, asked this rank to stop."""
        if self.received is None and self._launcher is not None and self._launcher.gone:
            self.received = _LAUNCHER_GONE
        return self.received is not None

    def stop_error(self, step: int) -> StoppedError:
        """Return the error that ends a run asked to stop. Collective: every rank must call."""
        received = reports(self.received)
        signals = ", ".join(f"{name} on rank {rank}" for rank, name in received.items())
        error = StoppedError(
            f"stopped by {signals or 'another rank'} after step {step}, which is saved; start the "
            "same command again to continue"
        )
        error.everywhere = True
        return error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            # The system's default also ends a process that waits in a collective; a notebook's
            # process must not end.
            interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
            before = self._before[signal.SIGINT]
            signal.signal(signal.SIGINT, before if interactive else signal.SIG_DFL)
            if ELASTIC in os.environ and signal.SIGTERM in self._before:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._rank == 0:
                line = b"hpdist: interrupted; the run is saved and stops (again: at once)\n"
                os.write(2, line)  # nothing buffered: this may have interrupted another write


def _stays_as_it_is(number: signal.Signals) -> bool:
    """Return whether a signal should be left to its present handler, or rightly is ignored."""
    handler = signal.getsignal(number)
    ignored = handler is signal.SIG_IGN and number in _MAY_BE_IGNORED
    return handler is None or ignored  # None: a handler that C code has installed
