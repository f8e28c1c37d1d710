"""Worker processes that decode images, sound and whatever else is worth it.

A process is a new interpreter that imports this module and nothing of the run's own: not its
`__main__`, and torch only to resize. Rows come back in memory without a name, which vanishes with
the last process that holds it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any, cast

import numpy as np
from PIL import Image, ImageFile

from hpdist.data.decode.arrays import (
    Arrays,
    copy_rows,
    mapped_arrays,
    memory_size,
    slice_rows,
)
from hpdist.data.decode.spec import InputSpec
from hpdist.errors import DataError
from hpdist.processes import end_with

_PARTS = 4  # per thread or process, so that an uneven batch keeps all of them busy
_TRIES = 3  # processes that may die on one part of a batch
_KEPT_BYTES = 16 << 20  # else every image's memory goes back to the system, a quarter of the time


class Pool:
    """Worker processes, and the memory that they decode into."""

    def __init__(self, spec: InputSpec, processes: int) -> None:
        self._spec = spec
        self._processes = processes
        self._owner = os.getpid()
        self._closed = False
        self._guard = threading.RLock()  # what `close` ends must not be started again beside it
        self._file = _unnamed_file()
        self._memory: mmap.mmap | None = None
        self._workers: list[_Worker] = []
        self._start()

    def decode(self, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        """Decode as `InputSpec.decode_into` does, but with the reasons in no order."""
        if os.getpid() != self._owner:
            raise RuntimeError("a Decoder with processes cannot be used in a fork of its process")
        try:
            return self._decode(values, out)
        except BaseException:  # also Ctrl-C: the answers to this batch must never reach the next
            self._end()
            raise

    def close(self) -> None:
        """End the processes; the memory goes with the last reference to it."""
        with self._guard:
            self._closed = True
            self._end()
            self._memory = None
            self._file.close()

    def _start(self) -> None:
        """Start what workers are missing; they import their modules side by side."""
        with self._guard:
            if self._closed:
                raise RuntimeError("the Decoder is closed")
            while len(self._workers) < self._processes:
                self._workers.append(_Worker(self._spec, self._file))

    def _end(self) -> None:
        with self._guard:
            while self._workers:
                self._workers.pop().end()

    def _decode(self, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        with self._guard:
            self._start()
            shared = self._shared(len(values))
        parts, reasons = parts_of(len(values), self._processes), dict[int, str]()
        pillow = _pillow_state()
        idle, deaths = list(self._workers), dict[int, int]()
        busy: dict[Connection, tuple[_Worker, slice]] = {}
        while parts or busy:
            while parts and idle:
                worker, part = idle.pop(), parts.popleft()
                busy[worker.connection] = (worker, part)
                worker.send((part.start, len(values)), values[part], pillow)
            for connection in cast("list[Connection]", wait(list(busy))):
                worker, part = busy.pop(connection)
                found = worker.receive()
                if found is None:
                    deaths[part.start] = deaths.get(part.start, 0) + 1
                    idle.append(self._replace(worker, part, deaths[part.start]))
                    parts.appendleft(part)
                    continue
                copy_rows(slice_rows(shared, part), slice_rows(out, part))
                reasons.update({part.start + line: why for line, why in found.items()})
                idle.append(worker)
        return reasons

    def _replace(self, worker: _Worker, part: slice, deaths: int) -> _Worker:
        """Start another worker in place of one that died, unless several did on the same rows."""
        with self._guard:
            status = worker.end()
            if worker in self._workers:
                self._workers.remove(worker)
            self._start()
            fresh = self._workers[-1]
        if deaths == _TRIES:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise DataError(
                f"decoding rows {part.start} to {part.stop - 1} of a batch ended {_TRIES} worker "
                f"processes, the last by {how}: one of the rows is too large for the memory or "
                "breaks the library that decodes it; find it by decoding without worker processes"
            )
        return fresh

    def _shared(self, rows: int) -> Arrays:
        """View the shared memory as so many rows; it is grown where it is too small."""
        layout = self._spec.layout
        size = max(memory_size(layout, rows), 1)
        if self._memory is None or len(self._memory) < size:
            os.ftruncate(self._file.fileno(), size)
            self._memory = mmap.mmap(self._file.fileno(), size)
        return mapped_arrays(layout, rows, self._memory)


class _Worker:
    """One process, started at once; messages wait for it until it has imported its modules."""

    def __init__(self, spec: InputSpec, file: IO[bytes]) -> None:
        self.connection, theirs = Pipe()
        numbers = f"{theirs.fileno()}, {file.fileno()}, {os.getpid()}"
        path = [entry for entry in sys.path if isinstance(entry, str)]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import work; work({numbers})"
        ours = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited, from birth
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), file.fileno()),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ours)
            theirs.close()
        self._send(spec)

    def send(self, place: tuple[int, int], values: Sequence[Any], pillow: tuple[Any, ...]) -> None:
        """Have values decoded into lines of the memory; `receive` is the answer.

        `place` is the first of these lines, and how many there are in all.
        """
        self._send((*place, values, pillow))

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it died: `receive` says so
            self.connection.send(message)

    def receive(self) -> dict[int, str] | None:
        """Why, by line from the first sent, values cannot be decoded; None when it died."""
        try:
            return cast("dict[int, str]", self.connection.recv())
        except (EOFError, OSError):
            return None

    def end(self) -> int:
        """Kill it, since it has nothing to lose, and return the exit status."""
        self._process.kill()
        return self._process.wait()


def _unnamed_file() -> IO[bytes]:
    """Memory that can be shared, and that no size of /dev/shm bounds."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("hpdist-decode"), "r+b")
    return tempfile.TemporaryFile()  # closed by the pool


def parts_of(rows: int, workers: int) -> deque[slice]:
    """Cut rows into contiguous parts, several per worker."""
    step = -(-rows // (_PARTS * workers)) or 1
    return deque(slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _pillow_state() -> tuple[Any, ...]:
    """What decides in Pillow how an image is decoded, and a new process would not know."""
    added = [
        (name, *Image.OPEN[name])
        for name in Image.ID
        if not Image.OPEN[name][0].__module__.startswith("PIL.")
    ]
    return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, added


def work(connection: int, memory: int, parent: int) -> None:
    """Be a worker process: decode what comes until the parent closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    np.empty(_KEPT_BYTES, np.uint8)  # freed at once, and glibc keeps as much for what follows
    line, mapped = Connection(connection), mmap.mmap(-1, 1)
    try:
        spec: InputSpec = line.recv()
        layout = spec.layout
        while True:
            start, rows, values, pillow = line.recv()
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, added = pillow
            for name, factory, accept in added:
                if name not in Image.OPEN:
                    Image.register_open(name, factory, accept)
            if len(mapped) < memory_size(layout, rows):
                mapped = mmap.mmap(memory, 0)  # all of it: it has grown
            out = mapped_arrays(layout, rows, mapped)
            part = slice(start, start + len(values))
            line.send(spec.decode_into(values, slice_rows(out, part)))
    except (EOFError, OSError):
        return  # the parent is gone
