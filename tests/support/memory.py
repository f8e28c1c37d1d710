"""How much memory of its own a process has: not pages of files, which processes share."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from torch import Tensor


def status(key: str) -> int:
    """Bytes of this process that the kernel counts under a name, as `VmRSS`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(key))
    return 1024 * int(found)


def own_memory() -> float:
    """MiB of this process's own."""
    return status("RssAnon") / 2**20


def free_at_once() -> None:
    """Have this process give back every block of 64 KiB or more as soon as it is freed.

    What was freed before is given back now, so that nothing new goes there unseen.
    """
    libc, mmap_threshold = ctypes.CDLL(None), -3  # the number that glibc gives it
    assert libc.mallopt(mmap_threshold, 65536) == 1
    libc.malloc_trim(0)


def mapped(tensor: Tensor) -> bool:
    """Whether a tensor is pages of a checkpoint's file."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= at < stop:
            return line.endswith(".safetensors")
    return False


class Peak:
    """The most memory of a process's own, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.most = own_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, own_memory())

    @property
    def rise(self) -> float:
        """MiB above what there was at the start."""
        return self.most - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, own_memory())
