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

from hpdist.data.decode.encoded import Array
from hpdist.data.decode.processes import Pool, parts_of
from hpdist.data.decode.stored_values import InputSpec

if TYPE_CHECKING:  # imported where it is used: torch takes seconds
    from torch import Tensor

_THREADS_PAY_PIXELS = 128 * 128  # below it, Pillow holds the interpreter's lock most of the time
_THREADS_PAY_BYTES = 4096  # the same of encoded images, where the stored size is not the spec's
_THREADS_PAY_SOUND = 65536  # bytes of a sound file
_JOIN_SECONDS = 0.5  # for threads that are in the middle of a row as the interpreter exits


class Decoder:
    """Decodes stored values into a tensor of their own, as `InputSpec.decode_valid` does.

    `threads` counts the calling thread. Threads are only used where they pay: for encoded images of
    at least 128 x 128 pixels and, with `views.size` (the stored images are larger than the spec
    says), for those of 4 KiB or more on average, and for sound files of 64 KiB or more on average.
    Smaller ones are decoded mostly under the interpreter's lock, and slower by several threads than
    by one.

    With `processes`, that many worker processes decode images and sound of every size, and
    `threads` is not used; arrays need no decoding and stay with the caller. A process that dies is
    replaced and its part decoded again. The workers ignore SIGINT and end with this process. They
    know the image formats that are registered with Pillow here, by classes that can be imported.

    Use it from one thread at a time. Closing it, its collection and the exit of the interpreter
    leave no thread, process or shared memory behind.
    """

    def __init__(self, spec: InputSpec, threads: int = 1, processes: int = 0) -> None:
        if threads < 1 or processes < 0:
            raise ValueError(f"{threads} threads and {processes} processes: give 1 and 0 or more")
        encoded = spec.stored in ("encoded", "sound")
        self._spec = spec
        self._pool = Pool(spec, processes) if processes and encoded else None
        self._threads = _Threads(threads - 1) if threads > 1 and not self._pool else None
        self._stop = [weakref.finalize(self, x.close) for x in (self._pool, self._threads) if x]
        self._closed = False

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, values: Sequence[Any], pin: bool = False) -> tuple[Tensor, dict[int, str]]:
        """Decode into a new tensor [rows, *spec.shape] of spec.dtype, page-locked on request.

        Also returns why, by line and in their order, for the values that cannot be decoded; their
        lines are zeros. Raises DataError when worker processes keep dying on the same rows.
        """
        import torch

        if self._closed:
            raise RuntimeError("the Decoder is closed")
        shape = (len(values), *self._spec.shape)
        inputs = torch.empty(shape, dtype=self._spec.dtype, pin_memory=pin)
        out = inputs.numpy()
        if self._pool is not None:
            reasons = self._pool.decode(values, out)
        elif self._threads is not None and len(values) > 1 and _threads_pay(self._spec, values):
            reasons = self._threads.decode(self._spec, values, out)
        else:
            reasons = self._spec.decode_array(values, out)
        return inputs, dict(sorted(reasons.items()))

    def close(self) -> None:
        """End threads and processes; a thread that waits for a process gets a RuntimeError."""
        self._closed = True
        for stop in self._stop:
            stop()


def _threads_pay(spec: InputSpec, values: Sequence[Any]) -> bool:
    if spec.stored not in ("encoded", "sound"):
        return False
    if spec.stored == "encoded" and spec.size is None:
        return spec.shape[1] * spec.shape[2] >= _THREADS_PAY_PIXELS
    least = _THREADS_PAY_BYTES if spec.stored == "encoded" else _THREADS_PAY_SOUND
    data = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    lengths = [len(value) for value in data if isinstance(value, bytes)]
    return sum(lengths) >= least * len(lengths)  # also where all are still in files


class _Threads:
    """Daemon threads that help the calling one; they stay, since new ones are a tenth slower."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._owner = 0
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: list[threading.Thread] = []

    def decode(self, spec: InputSpec, values: Sequence[Any], out: Array) -> dict[int, str]:
        """Decode with the calling thread and the others."""
        parts, reasons = parts_of(len(values), self._count + 1), dict[int, str]()
        done: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                while (part := _take(parts)) is not None:
                    found = spec.decode_array(values[part], out[part])
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
