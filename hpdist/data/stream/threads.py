"""Daemon threads that run calls: unlike a ThreadPoolExecutor's, a stuck one holds up no exit."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_LOCAL_THREADS = min(4, os.cpu_count() or 1)  # more than cores only get into each other's way
_REMOTE_THREADS = 16  # most of them wait for a server

T = TypeVar("T")
_Call = Callable[[], None]


class Awaited(Generic[T]):
    """What a call in another thread gives; kept once it is there, since to ask a Future is slow."""

    def __init__(self, future: Future[T]) -> None:
        self._future: Future[T] | None = future
        self._result: T

    def result(self) -> T:
        """Wait for it. Raises what the call raises."""
        if self._future is not None:
            self._result = self._future.result()
            self._future = None
        return self._result

    def cancel(self) -> None:
        """Do not begin the call."""
        if self._future is not None:
            self._future.cancel()


class DaemonThreads:
    """Runs submitted calls, first come first served, on at most `count` threads."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call as soon as a thread is free."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        self._calls.put(run)
        if len(self._threads) < self._count:
            arguments = (self._calls,)
            thread = threading.Thread(target=_work, args=arguments, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self, patience: float) -> None:
        """End the threads once they are idle; wait at most so many seconds for them."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(patience / max(len(self._threads), 1))


def reading_threads(remote: bool) -> DaemonThreads:
    """Threads that read Parquet files, from servers or from this machine alone."""
    return DaemonThreads(_REMOTE_THREADS if remote else _LOCAL_THREADS, "hpdist-parquet")


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call()
