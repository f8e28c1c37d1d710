"""One file that is read by byte ranges, and the files of this machine."""

from __future__ import annotations

import errno
import io
import os
import stat as modes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpdist.data.files.retry import (
    Failed,
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    cause,
)

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


class Source:
    """One file of some kind, and the version that is read."""

    def __init__(self, path: str, version: FileVersion | None) -> None:
        self.path = path
        self.version = version

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        """Ask for size and tag, once."""
        raise NotImplementedError

    def read(
        self, start: int, end: int, out: io.BytesIO, retry: Retry, stop: threading.Event | None
    ) -> None:
        """Append the range to `out`; raise Failed when less of it came."""
        raise NotImplementedError

    def match(self, found: FileVersion, end: int = 0) -> None:
        """Hold what was found to the version; without one, this is the version from here on."""
        if self.version is None:
            self.version = found
        if self.version.differs(found):
            raise FileChangedError(self.path, self.version, found)
        if found.size < end:
            raise FileLostError(self.path, f"ends at byte {found.size}, before {end}")


class Local(Source):
    """A file of this machine."""

    def __init__(self, path: str, version: FileVersion | None) -> None:
        super().__init__(path, version)
        self.name = path.partition("://")[2] if "://" in path else path

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        """Ask for size and time."""
        with self._judged():
            found = os.stat(self.name)
            if modes.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return FileVersion.of_local(found)

    def read(
        self, start: int, end: int, out: io.BytesIO, retry: Retry, stop: threading.Event | None
    ) -> None:
        """Append the range to `out`."""
        self.match(self.stat(retry, stop), end)
        with self._judged(), open(self.name, "rb") as file:
            file.seek(start)
            out.write(file.read(end - start))
            if file.tell() < end:
                raise Failed(f"ends at byte {file.tell()}, before {end}")

    def open(self) -> io.BufferedReader:
        """Open it as it is."""
        with self._judged():
            return open(self.name, "rb")

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FINAL) or error.errno in _FINAL_NUMBERS:
                raise FileLostError(self.path, error.strerror or cause(error)) from error
            raise Failed(cause(error)) from error
