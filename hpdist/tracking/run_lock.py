"""A run folder belongs to one run at a time: `.owner.json` in it names the owner, and is locked.

The lock is the system's (`flock`), so it ends with the process that holds it. With several
machines it is not enough: a network file system may keep locks to the machine, or have none.
There the owner also beats, by touching the file, and an owner that has not beaten for long counts
as dead. Only beats are compared, never the clocks of two machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from hpdist.errors import CheckpointError, why_not_written

OWNER = ".owner.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""An owner on another machine without a beat for this long is dead."""
_LOOK_SECONDS = 1.0
_LOCAL = {
    *("apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "ramfs"),
    *("tmpfs", "ufs", "xfs", "zfs"),
}
"""File systems of one machine, where a lock that was obtained has no other holder."""
_HELD: dict[Path, RunLock] = {}
"""The folders that this process owns."""


@dataclass(frozen=True)
class Owner:
    """The process that trains in a run folder."""

    token: str
    host: str
    boot: str
    """The machine's start: processes with the same value share a kernel."""
    device: int
    """The mounted file system, as that kernel numbers it."""
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class InUseError(CheckpointError):
    """Another run uses the run folder."""


class RunLock:
    """The ownership of a run folder. For the main process only.

    Args:
        folder: Of the run; it must exist.
        log: Receives a line if the check of an earlier owner takes time.
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self._path = (folder / OWNER).resolve()
        self._log = log
        self._file: int | None = None
        self._owner: Owner | None = None
        self._announced = False
        self._end = threading.Event()
        self.busy = False
        """Whether the run is active, so that no later one of this process may take the folder."""
        self.lost: str | None = None
        """The new owner, if this one was considered dead."""

    def acquire(self, seconds: float) -> bool:
        """Become the owner; False if others have owned it for this many seconds.

        Raises CheckpointError if the folder cannot be written.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                problem = self._try()
            except OSError as error:
                why = why_not_written(error, self._path.parent)
                where = str(self._path.parent)
                raise CheckpointError(
                    f"run.dir: cannot write to the run folder {where!r}: {why}"
                ) from error
            if problem is None:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0.01)))

    def refusal(self) -> InUseError:
        """The error if another run owns the folder."""
        owner, folder = self._read() or "another run", str(self._path.parent)
        return InUseError(
            f"run.dir: the run folder {folder!r} is in use by {owner}; "
            "end that run, choose another run.name, or wait for its end with run.wait (seconds)"
        )

    def release(self) -> None:
        """Release the folder. It may be called at any time, and repeatedly."""
        self._end.set()
        if self._file is None:
            return
        with suppress(OSError):  # the folder may be gone
            if self.lost is None and self._is_ours():
                self._path.unlink()  # while it is locked, so nobody can be about to use it
            os.close(self._file)
        self._file = None
        if _HELD.get(self._path) is self:
            del _HELD[self._path]

    def _try(self) -> str | None:
        """Become the owner, or return why not."""
        before = _HELD.get(self._path)
        if before is not None and before.busy:
            return "busy"
        if before is not None:
            before.lost = "a later Trainer of this process"
            before.release()
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked = _lock(file)
            if locked is None and not self._is_dead(file, local=False):
                return "beating"
            if locked is False:
                return "locked"
            if not _is_at(file, self._path):  # its owner has removed it meanwhile
                return "removed"
            if locked and not self._is_dead(file, local=_is_local(self._path)):
                return "beating"
            self._take(file)
            file = -1
        finally:
            if file >= 0:
                os.close(file)
        if locked is None:  # another process may have done the same; then the later one owns it
            time.sleep(2 * _LOOK_SECONDS)
            if not self._is_ours():
                self.lost = "another run"
                self.release()
                return "raced"
        return None

    def _is_dead(self, file: int, *, local: bool) -> bool:
        """Whether the owner in a file can no longer be active."""
        owner = _parse(os.pread(file, 65536, 0))
        if owner is None or local:
            return True
        if owner.boot == _boot() and owner.device == os.fstat(file).st_dev and _lock(file):
            return True  # on the same kernel, and it has released the lock
        if not self._announced:
            self._announced = True
            self._log(
                f"the run folder was {owner}'s; waiting up to {STALE_SECONDS:g} s to see whether "
                "that is still alive"
            )
        first, waited = _read_heartbeat(self._path), time.monotonic()
        while time.monotonic() - waited < STALE_SECONDS:
            time.sleep(_LOOK_SECONDS)
            if _read_heartbeat(self._path) != first:
                return False
        return True

    def _take(self, file: int) -> None:
        since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        device = os.fstat(file).st_dev
        token = secrets.token_hex(8)
        owner = Owner(token, socket.gethostname(), _boot(), device, os.getpid(), since)
        os.ftruncate(file, 0)
        os.pwrite(file, (json.dumps(asdict(owner)) + "\n").encode(), 0)
        self._file, self._owner = file, owner
        _HELD[self._path] = self
        threading.Thread(target=self._heartbeat, name="hpdist-owner", daemon=True).start()

    def _heartbeat(self) -> None:
        """Touch the file regularly; notice if another run owns it now, as after a long pause."""
        while not self._end.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full or failing disk; the next beat may pass
                if not self._is_ours():
                    self.lost = str(self._read() or "another run")
                    return
                os.utime(self._path)

    def _is_ours(self) -> bool:
        owner = self._read()
        return owner is not None and owner == self._owner

    def _read(self) -> Owner | None:
        try:
            return _parse(self._path.read_bytes())
        except OSError:
            return None


def _lock(file: int) -> bool | None:
    """Whether the lock was obtained; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _parse(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (TypeError, ValueError):  # empty for a moment, or truncated by a full disk
        return None


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read_heartbeat(path: Path) -> tuple[int, bytes] | None:
    """When the file was touched, and its content, as seen by a new reader."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError:
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _is_local(path: Path) -> bool:
    """Whether a file lies on a file system that only this machine can write."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return False
    kind, longest = "", -1
    for line in lines:
        fields = line.split()
        mount = fields[4].replace("\\040", " ")
        if len(mount) >= longest and path.is_relative_to(mount):
            kind, longest = fields[fields.index("-") + 1], len(mount)
    return kind in _LOCAL
