"""Shows the progress of long tasks: a line now and then in a log, a bar on a terminal.

    with working("evaluating data.test", total=len(rows), unit="rows") as work:
        for batch in batches:
            ...
            work.add(len(batch))

    @working("building the model")
    def build(): ...

Tasks that end within seconds show nothing, and of several ranks only rank 0 shows anything. The
bar disappears at the end; a log gets a last line with the duration, if it had any.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from hpdist.messages.human import duration
from hpdist.messages.redaction import redacted_text

_QUIET = 5.0  # seconds before the first line
_EVERY = 30.0  # seconds between lines of a log
_REFRESH = 0.5  # seconds between updates of a bar
_UNSIZED = 80  # columns of a terminal that does not report its size

_live: list[Work] = []  # of this process, the innermost last
_mutes: list[object] = []  # of this process; while there is one, nothing is shown


class Work:
    """A long task; `add` counts its progress.

    Args:
        what: The task, in the form "opening data.test".
        total: The number of items, if it is known.
        unit: Of the items, in the plural.
        rate: Whether a log's lines have the items per second and the time left.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, rate: bool = False
    ) -> None:
        self._what = redacted_text(what)
        self._total = total
        self._unit = unit
        self._rate = rate
        self._done = 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._announced = False
        self._bar: Any = None
        self._thread: threading.Thread | None = None

    def add(self, count: int) -> None:
        """Count finished items."""
        self._done += count

    @property
    def line(self) -> str:
        """The progress, for a log."""
        count = ""
        if self._unit:
            of = "" if self._total is None else f" of {self._total:,}"
            count = f"{self._done:,}{of} {self._unit}, "
        return f"{self._what}: {count}{duration(self._took)} so far{self._pace}"

    @property
    def _pace(self) -> str:
        """Items per second and the time left, where these are wanted and known."""
        if not self._rate or not self._done or self._took <= 0:
            return ""
        pace = self._done / self._took
        line = f", {pace:,.0f} {self._unit} a second"
        if self._total is None:
            return line
        return f"{line}, {duration(max(0, self._total - self._done) / pace)} left"

    @property
    def _took(self) -> float:
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Show progress from now on, in a thread: the work itself may be a single call."""
        _live.append(self)
        self._thread = threading.Thread(target=self._watch, name="hpdist-progress", daemon=True)
        self._thread.start()

    def end(self, well: bool) -> None:
        """Remove the bar; a log that has a line of the task gets a last one."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self in _live:
            _live.remove(self)
        if self._bar is not None:
            self._bar.close()
        elif self._announced and well:
            print_line(f"{self._what}: done in {duration(self._took)}")

    def _watch(self) -> None:
        wait = _QUIET
        try:
            while not self._ended.wait(wait):
                if _mutes:
                    continue
                if _live[-1] is not self:  # an inner task shows its own progress
                    wait = _REFRESH
                elif sys.stderr.isatty():
                    self._draw()
                    wait = _REFRESH
                else:
                    print_line(self.line)
                    self._announced = True
                    wait = _EVERY
        except (OSError, ValueError):  # there is no reader any more
            return

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = make_bar(
                total=self._total,
                desc=self._what,
                unit=f" {self._unit}",
                leave=False,
                delay=1e-6,  # so that it is not drawn before its first count
                bar_format=None if self._unit else "{desc}: {elapsed} so far",
            )
            self._bar.start_t -= self._took  # so that it counts from the start of the task
        self._bar.n = self._done
        self._bar.refresh()


@contextmanager
def working(
    what: str, total: int | None = None, unit: str = "", *, rate: bool = False
) -> Iterator[Work]:
    """Show the progress of the body, or of the function that this decorates."""
    work = Work(what, total, unit, rate=rate)
    if os.environ.get("RANK", "0") != "0":
        yield work
        return
    work.begin()
    well = False
    try:
        yield work
        well = True
    finally:
        work.end(well)


@contextmanager
def muted() -> Iterator[None]:
    """Show nothing on stderr in the body, in any thread of this process."""
    mark = object()
    _mutes.append(mark)
    try:
        yield
    finally:
        _mutes.remove(mark)


def make_bar(**settings: Any) -> Any:
    """A bar of tqdm on stderr, as wide as the terminal."""
    # Without the terminal's width tqdm would show nothing.
    sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    width = {"dynamic_ncols": True} if sized else {"ncols": _UNSIZED}
    return tqdm(**settings, **width)


def columns() -> int | None:
    """The width of the terminal; None if stderr is none, or nothing is shown."""
    if _mutes or not sys.stderr.isatty():
        return None
    return os.get_terminal_size(sys.stderr.fileno()).columns or _UNSIZED


def print_line(line: str) -> None:
    """Print a line to stderr, above any bars."""
    if _mutes:
        return
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
