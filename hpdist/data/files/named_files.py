"""Files that the rows of a data set name, in place of holding their bytes.

    rule = PathRule(folders=("/data/set",))
    NamedFile("/data/set/a.png", rule).read()

Rows may be a stranger's. What they name is opened only where it belongs to the data: a regular file
below the data's own folders, or an address of the data's own server. A device, a pipe or a file
beyond the limit is never read. What is refused is a ValueError with the reason, so that the row is
a bad one.
"""

from __future__ import annotations

import os
import stat as modes
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from hpdist.data.files.retry import Failed, Retry, is_remote, run_in_thread
from hpdist.messages.redaction import redacted

_SETTING = "data.loading.paths"
_LOCAL = ("file", "local")
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lzma", "zstd", "lz4")  # as `datasets` chains them
_SERVERS = ("http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci")
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW
_SECONDS = 60.0  # that the file of one row may take to come from a server
_KINDS = {
    modes.S_IFDIR: "a folder",
    modes.S_IFIFO: "a pipe",
    modes.S_IFSOCK: "a socket",
    modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Limits:
    """The largest inputs that a single row may have; `data.loading` sets them."""

    pixels: int = 50_000_000
    """Most pixels of an image, as its header says."""
    samples: int = 100_000_000
    """Most samples of the sound that a row holds, over all of its channels."""
    bytes: int = 256 * 2**20
    """Most bytes of an encoded image or sound, in the row or in a file that it names."""


USUAL_LIMITS = Limits()


@dataclass(frozen=True)
class PathRule:
    """Which files the rows of one data set may name."""

    folders: tuple[str, ...] = ()
    """Real paths: a file's own real path, with all links followed, lies below one of them."""
    listed: tuple[str, ...] = ()
    """Folders whose files were found by listing them: links below them are the user's own."""
    servers: tuple[str, ...] = ()
    """What addresses begin with: `https://host/`, `hf://datasets/user/name`."""
    anywhere: bool = False
    """Whether any regular file and any server may be named."""
    most_bytes: int = Limits.bytes
    patience: float = _SECONDS

    def local_path(self, path: str) -> str:
        """Give the real path of a file of this machine that a row may name, else raise."""
        if "\0" in path:
            raise ValueError("it names a file by a name that no file has")
        name = path.partition("://")[2] if "://" in path else path
        real = os.path.realpath(name)
        if self.anywhere or any(_is_below(real, folder) for folder in self.folders):
            return real
        lexical = os.path.abspath(name)
        if any(_is_below(lexical, folder, hidden=True) for folder in self.listed):
            return real
        raise ValueError(
            f"it names the file {path!r}, which does not lie in the data's own folder; if it may "
            f"be read, name its folder in {_SETTING}"
        )

    def check_address(self, path: str) -> None:
        """Raise ValueError for an address that a row may not name."""
        *chain, last = path.split("::")
        scheme = last.partition("://")[0].lower()
        inside = all(part.partition("://")[0].lower() in _ARCHIVES for part in chain)
        if inside and not is_remote(last):
            if not os.path.isfile(self.local_path(last)):
                raise ValueError(f"it names {last!r}, which is no archive")
            return
        allowed = self.anywhere and scheme in _SERVERS
        if inside and (allowed or any(_is_of(last, server) for server in self.servers)):
            return
        raise ValueError(
            f"it names {redacted(path)!r}, which is not of the data's own server; if it may be "
            f"read, name what its address begins with in {_SETTING}"
        )


NOTHING = PathRule()
"""Allows no file at all."""


@dataclass(frozen=True)
class NamedFile:
    """A file that a row names, and which files its data set may name."""

    path: str
    rule: PathRule

    @property
    def is_remote(self) -> bool:
        """Whether it is asked of a server, or has to be taken out of an archive."""
        return is_remote(self.path) or "::" in self.path

    def read(self) -> bytes:
        """Read the whole file.

        Raises ValueError where the rule forbids it or it is no regular file, and OSError or
        DataError where it cannot be read.
        """
        if self.is_remote:
            self.rule.check_address(self.path)
            return _fetched(self.path, self.rule)
        with self.open() as file:
            # As much as the file has, and no more: files of the kernel, which have no size, may
            # never end.
            return file.read(os.fstat(file.fileno()).st_size)

    def open(self) -> IO[bytes]:
        """Open a file of this machine, to read its beginning alone. Raises what `read` raises."""
        if self.is_remote:
            raise ValueError("only a file of this machine is read in part")
        return _opened(self.rule.local_path(self.path), self.path, self.rule.most_bytes)


def named(values: Iterable[Any], rule: PathRule) -> list[Any]:
    """Put a NamedFile in the place of stored values that hold a path and no bytes."""
    return [
        NamedFile(str(value["path"]), rule)
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path")
        else value
        for value in values
    ]


def server_of(address: str) -> str | None:
    """Give what the addresses of an address's own server, bucket or repository begin with."""
    last = address.split("::")[-1]
    scheme, mark, rest = last.partition("://")
    if not mark or scheme.lower() in _LOCAL:
        return None
    parts = rest.split("/")
    kept = 1
    if scheme.lower() == "hf":  # hf://datasets/user/name@revision/file
        kept = 3 if parts[0] in ("datasets", "spaces", "buckets") else 2
    return f"{scheme}://" + "/".join(parts[:kept]).partition("@" if kept > 1 else "\0")[0]


def _is_below(path: str, folder: str, *, hidden: bool = False) -> bool:
    """Whether a path lies below a folder, and where asked for, not in something hidden there."""
    if os.path.dirname(folder) == folder:  # of the whole disk nothing is one's own
        return False
    inside = path.startswith(folder.rstrip(os.sep) + os.sep)
    rest = path[len(folder) :].strip(os.sep).split(os.sep)
    return inside and (hidden or not any(part.startswith(".") for part in rest))


def _is_of(address: str, server: str) -> bool:
    """Whether an address is of a server, or of the folder on it that is named."""
    if any(ord(char) <= 32 or char in "\\\x7f" for char in address):
        return False
    ours, theirs = urlsplit(server), urlsplit(address)
    if (ours.scheme.lower(), ours.netloc.lower()) != (theirs.scheme.lower(), theirs.netloc.lower()):
        return False
    if ".." in theirs.path.replace("%2e", ".").replace("%2E", ".").split("/"):
        return False
    below = ours.path.rstrip("/")
    rest = theirs.path[len(below) :]
    return theirs.path.startswith(below) and (not rest or rest[0] in "/@" or not below)


def _opened(real: str, path: str, most: int) -> IO[bytes]:
    """Open a regular file of at most so many bytes, and wait for nothing."""
    # Looked at first, since opening a device alone may do something, and once more when it is open.
    _check_file(os.stat(real), path, most)
    file = os.fdopen(os.open(real, _FLAGS), "rb")
    try:
        _check_file(os.fstat(file.fileno()), path, most)
    except ValueError:
        file.close()
        raise
    return file


def _check_file(found: os.stat_result, path: str, most: int) -> None:
    if not modes.S_ISREG(found.st_mode):
        kind = _KINDS.get(modes.S_IFMT(found.st_mode), "no regular file")
        raise ValueError(f"it names {path!r}, which is {kind} and no file with data")
    if found.st_size > most:
        raise too_large(f"the file {path!r}", found.st_size, most)
    if not found.st_size:
        raise ValueError(f"it names the file {path!r}, which is empty")


def too_large(what: str, size: int, most: int) -> ValueError:
    """Say that something holds more bytes than a row may."""
    return ValueError(
        f"{what} holds {size} bytes, more than {most}; if that is right, raise "
        "data.loading.most_bytes"
    )


def _fetched(path: str, rule: PathRule) -> bytes:
    """Read a file from a server or out of an archive, within the limits of bytes and seconds."""
    seconds = min(rule.patience, _SECONDS)
    end = threading.Event()
    timer = threading.Timer(seconds, end.set)  # a server that sends little by little makes progress
    timer.daemon = True
    timer.start()
    try:
        return _unpacked(path, rule, seconds) if "::" in path else _ranged(path, rule, seconds, end)
    except (InterruptedError, Failed):
        raise ValueError(f"the file {redacted(path)!r} did not come within {seconds:g} s") from None
    finally:
        timer.cancel()


def _ranged(path: str, rule: PathRule, seconds: float, end: threading.Event) -> bytes:
    # A decoding process imports what it needs for servers only where a row names one.
    from hpdist.data.files.open import read_range, stat

    retry = Retry(seconds, stall=min(Retry.stall, seconds))
    version = stat(path, retry, end)
    if version.size > rule.most_bytes:
        raise too_large(f"the file {redacted(path)!r}", version.size, rule.most_bytes)
    return read_range(path, 0, version.size, retry, version, end)


def _unpacked(path: str, rule: PathRule, seconds: float) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    def read() -> bytes:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read(rule.most_bytes + 1)  # whatever the archive says that it holds
        return data

    data = run_in_thread(read, None, seconds)
    if len(data) > rule.most_bytes:
        raise too_large(f"the file {redacted(path)!r}", len(data), rule.most_bytes)
    return data
