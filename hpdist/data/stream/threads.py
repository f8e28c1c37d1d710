"""Daemon threads that run calls: unlike a ThreadPoolExecutor's, a stuck one holds up no exit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_Call = Callable[[], None]


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


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call()
