"""Waiting for what may pass by itself: the versions, errors and attempts of reading a file."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any, TypeVar

from hpdist.errors import DataError
from hpdist.messages.redaction import redact_log_lines, redacted, redacted_text

T = TypeVar("T")

SLOWEST = 4 << 10  # bytes a second; less is no progress

_NOTICE = 30.0  # seconds between two lines of log about one host
_POLL = 0.05  # seconds

_log = logging.getLogger("hpdist.data")
_jitter = random.SystemRandom()  # no seed of a run, and no other process, draws from it
_noticed: dict[str, float] = {}  # when a host was last logged

redact_log_lines()


@dataclass(frozen=True)
class FileVersion:
    """What tells one state of a file from another."""

    size: int
    tag: str  # ETag, the Hub's id of the content, mtime in ns; "" where none is known

    @staticmethod
    def of_local(found: os.stat_result) -> FileVersion:
        """That of a file of this machine."""
        return FileVersion(found.st_size, str(found.st_mtime_ns))

    def differs(self, found: FileVersion) -> bool:
        """Whether the file found is another one; a tag that is unknown is taken for the same."""
        return self.size != found.size or "" != self.tag != found.tag != ""


class FileLostError(Exception):
    """A file that is not there, or not for this reader, and will not be."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{redacted(path)}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


class FileChangedError(Exception):
    """A file that is another one than it was."""

    def __init__(self, path: str, expected: FileVersion, found: FileVersion) -> None:
        super().__init__(
            f"{redacted(path)}: the file changed, from {expected.size} bytes (tag "
            f"{expected.tag or 'none'}) to {found.size} bytes (tag {found.tag or 'none'})"
        )
        self.path = path
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.expected, self.found)


class UnreachableError(DataError):
    """A file could not be read for longer than one is willing to wait."""


@dataclass(frozen=True)
class Retry:
    """How long what may pass by itself is waited for."""

    deadline: float = 300.0
    """Seconds that one read may fail without progress."""
    first_wait: float = 0.5
    """Seconds before the second attempt, at most: a random part is waited. Doubles every time."""
    max_wait: float = 20.0
    """Seconds that the doubling stops at."""
    stall: float = 30.0
    """Seconds after which a transfer has failed that delivers nothing, or under 4 KiB a second."""


class Failed(Exception):  # noqa: N818
    """An attempt that failed in a way that may pass."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for


def is_remote(path: str) -> bool:
    """Whether a path is a URL of anything but a local file."""
    return "://" in path and path.partition("://")[0] not in ("file", "local")


def with_retries(
    path: str,
    retry: Retry,
    stop: threading.Event | None,
    attempt: Callable[[], T],
    gained: Callable[[], int] = lambda: 0,
) -> T:
    """Try until it works; `gained` counts the bytes that the attempts have brought so far."""
    began = time.monotonic()
    before = tries = 0
    noticed: float | None = None
    while True:
        check_cancelled(stop)
        try:
            value = attempt()
        except Failed as failure:
            now = time.monotonic()
            if gained() - before > SLOWEST * (now - began):
                began, before, tries = now, gained(), 0
            left = began + retry.deadline - now
            tries += 1
            if left <= 0:
                raise UnreachableError(
                    f"{redacted(path)}: could not be read for {now - began:.0f} s, in {tries} "
                    f"attempts; the last one: {failure}; check the network and the server, then "
                    "start again: the run can be resumed"
                ) from None  # the cause may name what the message leaves out
            if _notice(path, str(failure), left) and noticed is None:
                noticed = now
            most = min(retry.max_wait, retry.first_wait * 2.0 ** min(tries - 1, 30))
            if failure.wait:
                most = retry.first_wait  # spreads out those that were told the same
            wait = failure.wait + _jitter.uniform(0, most)
            (stop or threading.Event()).wait(min(wait, left))
        else:
            if noticed is not None:
                _log.info(
                    "%s: reads again after %.0f s", redacted(path), time.monotonic() - noticed
                )
            return value


def run_in_thread(
    call: Callable[[], T], stop: threading.Event | None, seconds: float = float("inf")
) -> T:
    """Run what blocks; leave it behind when `stop` is set or it takes too long."""
    if stop is None and seconds == float("inf"):
        return call()
    outcome: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # handed on to who waits for it
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="hpdist-read").start()
    end = time.monotonic() + seconds
    while not futures.wait([outcome], _POLL).done:
        check_cancelled(stop)
        if time.monotonic() > end:
            raise Failed(f"no answer in {seconds:.0f} s")
    return outcome.result()


def check_cancelled(stop: threading.Event | None) -> None:
    """Raise InterruptedError where one is asked to stop."""
    if stop is not None and stop.is_set():
        raise InterruptedError("the read was stopped")


def host_of(path: str) -> str:
    """Take the host, or bucket, of a URL."""
    return path.partition("://")[2].partition("/")[0]


def _notice(path: str, reason: str, left: float) -> bool:
    """Log a failure, unless one of the same host was logged just now."""
    now, host = time.monotonic(), host_of(path)
    if now - _noticed.get(host, float("-inf")) < _NOTICE:
        return False
    _noticed[host] = now
    _log.warning("%s: %s; trying again for up to %.0f s", redacted(path), reason, left)
    return True


def cause(error: BaseException) -> str:
    """An error on one line, without secrets."""
    text = redacted_text(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")
