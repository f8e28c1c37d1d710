"""A lock around the compilation of an extension; it ends with the process that holds it.

PyTorch's own lock is a file named `lock` in the extension's folder: a process that is killed while
compiling leaves it, and every later start waits for it for ever, without a message
(https://github.com/pytorch/pytorch/issues/189245). Here one process of a machine compiles under
`flock`, the others notice when it dies, and a file that no process holds is removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

Log = Callable[[str], None]
QUIET = 600.0
"""Seconds without a change after which a lock counts as abandoned if the kernel cannot tell."""
_POLL = 0.1  # seconds
_FIRST_WORD = 5.0  # seconds of waiting before the first message
_NEXT_WORD = 60.0
_TWICE = 0.5  # seconds between two checks: PyTorch closes its file a moment before it removes it
_SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "9p",
    "virtiofs",
    "fuse",
)
_COMPILER = re.compile(
    r"ninja|c\+\+|g\+\+|gcc|cc1|clang|icp?x|nvcc|cicc|ptxas|cudafe|fatbin|hipcc|collect2|s?ccache|"
    r"(x86_64|aarch64)-|(cc|as|ld)$|ld\."
)


class Process(NamedTuple):
    """A process of this machine that works in the folder."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


@contextmanager
def build_lock(folder: Path, what: str, log: Log) -> Iterator[None]:
    """Hold the folder of an extension exclusively, and remove an abandoned lock of PyTorch's.

    Waits for the holder and logs who that is; the lock of a process that dies is free at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder, what, log)
    try:
        _await_pytorch(folder / "lock", log)
        yield
    finally:
        os.close(descriptor)  # which releases it


def left_lock(lock: Path) -> str | None:
    """Explain why nobody can hold a lock file of PyTorch's any more; None if somebody may."""
    if not lock.exists() or in_use(lock) is not None:
        return None
    time.sleep(_TWICE)
    if not lock.exists() or in_use(lock) is not None:
        return None
    return "no process has it open, and none compiles in its folder"


def in_use(lock: Path) -> str | None:
    """Name who holds, or may hold, a lock file of PyTorch's; None if nobody does."""
    compiling = working_in(lock.parent)
    if compiling:
        return f"{compiling[0]} compiles there"
    opened = _opened(lock)
    if opened is False and not _is_shared(lock.parent):
        return None
    holders = _holders(lock)
    if opened or holders:
        return f"{holders[0] if holders else 'a process'} has it open"
    age = time.time() - _latest_change(lock.parent)
    if age < QUIET:
        return f"the folder changed {max(age, 0):.0f} s ago; hpdist waits {QUIET:.0f} s"
    return None


def working_in(folder: Path) -> list[Process]:
    """Find ninja and the compilers that work in a folder, which is their working directory."""
    target = os.path.realpath(folder)
    return [
        Process(int(entry.name), _name(entry))
        for entry in _processes()
        if _link(entry / "cwd") == target and _COMPILER.match(_name(entry))
    ]


def last_change(folder: Path) -> tuple[int, int]:
    """Return a fingerprint of the folder's content that changes when a file is written."""
    times = [entry.stat().st_mtime_ns for entry in _entries(folder)]
    return len(times), max(times, default=0)


def _acquire(folder: Path, what: str, log: Log) -> int:
    path = folder / "hpdist.lock"
    descriptor = _open(path)
    waiting = _Wait(log)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
                # The file system has no locks: lock on this machine only.
                os.close(descriptor)
                digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
                path = Path(tempfile.gettempdir(), f"hpdist-build-{os.getuid()}-{digest}.lock")
                descriptor = _open(path)
                continue
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                raise
        waiting.word(f"waiting for {_owner_of(descriptor)} ({path})")
        time.sleep(_POLL)
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": time.time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    return descriptor


def _await_pytorch(lock: Path, log: Log) -> None:
    waiting = _Wait(log)
    while lock.exists():
        why = left_lock(lock)
        if why is not None:
            lock.unlink(missing_ok=True)
            log(f"removed {lock}, which a start that was killed had left: {why}")
            return
        waiting.word(f"waiting for {lock} to go: {in_use(lock)}")
        time.sleep(_TWICE)


class _Wait:
    """Logs what is waited for after a while, and repeats it from time to time."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # One rank of a machine logs for all that wait.
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        self._next = time.monotonic() + _FIRST_WORD if speaks else float("inf")

    def word(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._log(text)
            self._next = time.monotonic() + _NEXT_WORD


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _owner_of(descriptor: int) -> str:
    """Name the holder of our lock, as it wrote into the file."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        since = max(time.time() - facts["since"], 0)
        return (
            f"process {facts['pid']} on {facts['host']}, which has been compiling {facts['what']} "
            f"for {since:.0f} s"
        )
    except (ValueError, KeyError, TypeError):  # it has written nothing yet
        return "another process"


def _opened(lock: Path) -> bool | None:
    """Ask the kernel whether any process has a file open; None if it cannot tell.

    It grants a write lease only on a file that nobody else has open, in any namespace.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Whoever opens it meanwhile makes the kernel send a signal, which by default would kill us.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except BlockingIOError:
        return True
    except OSError:  # not our file, or a file system without leases
        return None
    finally:
        os.close(descriptor)


def _holders(lock: Path) -> list[Process]:
    """Find the processes of this user that have a file open."""
    target = os.path.realpath(lock)
    found = []
    for entry in _processes():
        try:
            descriptors = list((entry / "fd").iterdir())
        except OSError:  # ended, or another user's
            continue
        if any(_link(descriptor) == target for descriptor in descriptors):
            found.append(Process(int(entry.name), _name(entry)))
    return found


def _is_shared(folder: Path) -> bool:
    """Whether other machines may write to the folder too."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return True
    best, kind = "", ""
    target = os.path.realpath(folder)
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind.startswith(_SHARED)


def _latest_change(folder: Path) -> float:
    return max((entry.stat().st_mtime for entry in _entries(folder)), default=0.0)


def _entries(folder: Path) -> list[Path]:
    """The files of a folder that still exist when they are examined, except our own lock."""
    try:
        return [p for p in folder.iterdir() if p.name != "hpdist.lock" and p.exists()]
    except OSError:
        return []


def _processes() -> Iterator[Path]:
    root = Path("/proc")
    if root.is_dir():
        yield from (entry for entry in root.iterdir() if entry.name.isdigit())


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _name(entry: Path) -> str:
    try:
        return (entry / "comm").read_text().strip()
    except OSError:
        return "?"
