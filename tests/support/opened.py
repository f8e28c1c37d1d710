"""Counts what a process asks of a folder: opens, by the kernel's own word, and stats."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OPEN = 0x20  # IN_OPEN
_HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name


@dataclass
class Asked:
    """How often each file of the folder was opened, and how many stats there were anywhere."""

    opened: Counter[str] = field(default_factory=Counter)
    stats: int = 0


@contextmanager
def counted(folder: Path) -> Iterator[Asked]:
    """Count within; every library's opens are there, also those that Python does not know of."""
    asked, libc = Asked(), ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    stat = os.stat

    def counting(*args: Any, **options: Any) -> os.stat_result:
        asked.stats += 1
        return stat(*args, **options)

    try:
        assert libc.inotify_add_watch(watch, os.fsencode(folder), _OPEN) >= 0
        os.stat = counting  # type: ignore[assignment]
        yield asked
        os.stat = stat
        asked.opened.update(_names(watch))
    finally:
        os.stat = stat
        os.close(watch)


def _names(watch: int) -> Iterator[str]:
    """The names of all events since the last call."""
    while True:
        try:
            events = os.read(watch, 1 << 20)
        except BlockingIOError:
            return
        while events:
            *_, length = _HEAD.unpack_from(events)
            name = events[_HEAD.size : _HEAD.size + length].rstrip(b"\0")
            events = events[_HEAD.size + length :]
            if name:  # else it is the folder itself
                yield os.fsdecode(name)
