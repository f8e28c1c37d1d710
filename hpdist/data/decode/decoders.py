"""Decode a batch by threads or by processes: the order and the result are always the same."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from hpdist.data.decode.arrays import Arrays, slice_rows
from hpdist.data.decode.processes import Pool, parts_of
from hpdist.data.decode.spec import InputSpec, arrays_of

if TYPE_CHECKING:  # imported where it is used: torch takes seconds
    from hpdist.data.structures import Structure

_JOIN_SECONDS = 0.5  # for threads that are in the middle of a row as the interpreter exits


class Decoder:
    """Decodes stored values into tensors of their own, as `InputSpec.decode_valid` does.

    `threads` counts the calling thread. Threads are only used where the spec says that they pay:
    for encoded images of at least 128 x 128 pixels and, with `views.size` (the stored images are
    larger than the spec says), for those of 4 KiB or more on average, and for sound files of 64 KiB
    or more on average. Smaller ones are decoded mostly under the interpreter's lock, and slower by
    several threads than by one.

    With `processes`, that many worker processes decode what the spec calls worth it, images and
    sound of every size, and `threads` is not used; arrays need no decoding and stay with the
    caller. A process that dies is
    replaced and its part decoded again. The workers ignore SIGINT and end with this process. They
    know the image formats that are registered with Pillow here, by classes that can be imported.

    Use it from one thread at a time. Closing it, its collection and the exit of the interpreter
    leave no thread, process or shared memory behind.
    """

    def __init__(self, spec: InputSpec, threads: int = 1, processes: int = 0) -> None:
        if threads < 1 or processes < 0:
            raise ValueError(f"{threads} threads and {processes} processes: give 1 and 0 or more")
        self._spec = spec
        self._pool = Pool(spec, processes) if processes and spec.worth_processes else None
        self._threads = _Threads(threads - 1) if threads > 1 and not self._pool else None
        self._stop = [weakref.finalize(self, x.close) for x in (self._pool, self._threads) if x]
        self._closed = False

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, values: Sequence[Any], pin: bool = False) -> tuple[Structure, dict[int, str]]:
        """Decode into a new tensor, or tensors by name, [rows, *], page-locked on request.

        Also returns why, by line and in their order, for the values that cannot be decoded; their
        lines are zeros. Raises DataError when worker processes keep dying on the same rows.
        """
        if self._closed:
            raise RuntimeError("the Decoder is closed")
        inputs = self._spec.empty(len(values), pin)
        out = arrays_of(inputs)
        if self._pool is not None:
            reasons = self._pool.decode(values, out)
        elif self._threads is not None and len(values) > 1 and self._spec.threads_pay(values):
            reasons = self._threads.decode(self._spec, values, out)
        else:
            reasons = self._spec.decode_into(values, out)
        return inputs, dict(sorted(reasons.items()))

    def close(self) -> None:
        """End threads and processes; a thread that waits for a process gets a RuntimeError."""
        self._closed = True
        for stop in self._stop:
            stop()


class _Threads:
    """Daemon threads that help the calling one; they stay, since new ones are a tenth slower."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._owner = 0
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: list[threading.Thread] = []

    def decode(self, spec: InputSpec, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        """Decode with the calling thread and the others."""
        parts, reasons = parts_of(len(values), self._count + 1), dict[int, str]()
        done: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                while (part := _take(parts)) is not None:
                    found = spec.decode_into(values[part], slice_rows(out, part))
                    reasons.update({part.start + line: why for line, why in found.items()})
            except BaseException as error:  # raised by the calling thread
                done.put(error)
            else:
                done.put(None)

        self._start()
        try:
            for _ in self._running:
                self._jobs.put(work)
            work()
            ends = [done.get() for _ in range(self._count + 1)]
        finally:
            parts.clear()  # also after Ctrl-C: the others end with the part that they hold
        for error in ends:
            if error is not None:
                raise error
        return reasons

    def _start(self) -> None:
        if self._owner == os.getpid():  # a fork has none of them
            return
        self._owner, self._jobs = os.getpid(), SimpleQueue()
        self._running = [
            threading.Thread(
                target=_serve, args=(self._jobs,), name=f"hpdist-decode-{number}", daemon=True
            )
            for number in range(1, self._count + 1)
        ]
        for thread in self._running:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        if self._owner != os.getpid():
            return
        for _ in self._running:
            self._jobs.put(None)
        for thread in self._running:
            if thread is not threading.current_thread():  # the collector may run in any thread
                thread.join(_JOIN_SECONDS)


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    """Run what comes until that is None; holds no reference to the Decoder, nor to a past batch."""
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job


def _take(parts: deque[slice]) -> slice | None:
    with suppress(IndexError):
        return parts.popleft()
    return None
