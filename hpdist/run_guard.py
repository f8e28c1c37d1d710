"""What stands between a run and its end: signals that ask it to stop, and a watch for hangs."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hpdist.distributed.reduce import gathered
from hpdist.distributed.watchdog import Watchdog
from hpdist.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunGuard:
    """While it is entered, SIGTERM and SIGUSR1 are noted, and a hang ends the run.

    Further signals of these kinds change nothing: schedulers and launchers often send several.

    Args:
        rank: This one.
        seconds: How long a step may take; `None` watches nothing.
    """

    def __init__(self, rank: int, seconds: float | None) -> None:
        self.received: str | None = None
        """The signal that asked this rank to stop."""
        self._watchdog = Watchdog(rank, seconds)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RunGuard:
        if threading.current_thread() is threading.main_thread():  # else Python allows no handler
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
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

    def beat(self, step: int, doing: str) -> None:
        """Tell of progress."""
        self._watchdog.beat(step, doing)

    def stopping(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self.received is not None

    def stopped(self, step: int) -> StoppedError:
        """The error that ends a run which a signal stopped. Collective: every rank must call."""
        received = {rank: name for rank, name in enumerate(gathered(self.received)) if name}
        told = ", ".join(f"{name} on rank {rank}" for rank, name in received.items())
        error = StoppedError(
            f"stopped by {told or 'another rank'} after step {step}, which is saved; start the "
            "same command again to go on"
        )
        error.everywhere = True
        return error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
