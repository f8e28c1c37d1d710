"""The kinds of file that can be read: local, on a web server, on the Hub, in an object store."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat as modes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec  # type: ignore[import-untyped]
import httpx
from huggingface_hub import HfFileSystem, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from hpdist.data.files.retry import (
    SLOWEST,
    Failed,
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    T,
    cause,
    check_cancelled,
    host_of,
    is_remote,
    run_in_thread,
)
from hpdist.errors import DataError
from hpdist.messages.redaction import redacted

_CONNECT = 10.0  # seconds
_WHOLE = 64 << 20  # bytes of a file that is read whole, where the server knows no ranges
_PIECE = 4 << 20  # bytes that an object store is asked for at once
_INNER = 60.0  # seconds that a file system may take for its own attempts, over `stall`
_BUSY = (408, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
_TAGS = (
    *("ETag", "etag", "e_tag", "generation", "md5", "checksum"),
    *("LastModified", "last_modified", "mtime", "updated", "modified", "created"),
)


class _Astray(Exception):  # noqa: N818
    """A redirect that leads to no web address."""


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
            if isinstance(error, _FINAL) or error.errno in _FINAL_NUMBERS:
                raise FileLostError(self.path, error.strerror or cause(error)) from error
            raise Failed(cause(error)) from error


class _Web(Source):
    """A file on a web server."""

    def address(self, retry: Retry, stop: threading.Event | None) -> tuple[str, dict[str, str]]:
        """Find the URL and the headers to send."""
        return self.path, {}

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        # Not HEAD: signed URLs are good for GET alone.
        url, headers = self.address(retry, stop)

        def ask() -> FileVersion:
            with self._answer(url, headers, "bytes=0-0", retry) as answer:
                found = self._found(answer)
                if answer.status_code == 206:
                    answer.read()  # so that the connection can be used again
            if found.size < 0:
                raise DataError(f"{redacted(self.path)}: the server names no size of the file")
            return found

        return run_in_thread(ask, stop)

    def read(
        self, start: int, end: int, out: io.BytesIO, retry: Retry, stop: threading.Event | None
    ) -> None:
        url, headers = self.address(retry, stop)

        def transfer() -> None:
            with self._answer(url, headers, f"bytes={start}-{end - 1}", retry) as answer:
                skip = self._offset(answer, start, end)
                missing = end - start
                for chunk in _steady(answer.iter_raw(), retry.stall, stop):
                    part = chunk[skip : skip + missing]
                    skip = max(0, skip - len(chunk))
                    out.write(part)
                    missing -= len(part)
                    if not missing and answer.status_code == 200:
                        break  # the rest is not wanted; a 206 ends by itself
            if missing:
                raise Failed(f"{missing} of {end - start} bytes did not come")

        run_in_thread(transfer, stop)

    def _offset(self, answer: httpx.Response, start: int, end: int) -> int:
        """Check an answer and say how many of its bytes come before the range."""
        found = self._found(answer)
        if found.size >= 0:
            self.match(found, end)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise DataError(f"{redacted(self.path)}: the server compresses it: no byte ranges")
        if answer.status_code == 200:
            if not 0 <= found.size <= _WHOLE and (start or end != found.size):
                raise DataError(
                    f"{redacted(self.path)}: the server serves no byte ranges, and the file is too "
                    "large to be read whole each time; copy it to a server that does, or to disk"
                )
            return start
        if _range(answer)[0] != start:
            raise Failed("the server answered another range than was asked for")
        return 0

    @contextmanager
    def _answer(
        self, url: str, headers: dict[str, str], wanted: str, retry: Retry
    ) -> Iterator[httpx.Response]:
        headers = {**headers, "Range": wanted}
        patience = httpx.Timeout(retry.stall, connect=_CONNECT, pool=None)
        try:
            with _client().stream("GET", url, headers=headers, timeout=patience) as answer:
                status = answer.status_code
                if status not in (200, 206, 416):
                    raise _by_status(self.path, status, answer.headers)
                if status == 416 and self._found(answer).size < 0:
                    raise FileLostError(self.path, f"HTTP {status} for {wanted}")
                yield answer
        except _Astray as error:
            raise FileLostError(self.path, str(error)) from None
        except (httpx.TransportError, OSError) as error:
            if isinstance(error, InterruptedError):
                raise
            raise Failed(cause(error)) from error
        except (httpx.InvalidURL, httpx.RequestError) as error:  # redirects without end
            raise FileLostError(self.path, cause(error)) from error

    def _found(self, answer: httpx.Response) -> FileVersion:
        """Read the version of the file from an answer; a size of -1: it is not named."""
        total = answer.headers.get("content-length", "")
        if answer.status_code != 200:
            total = _range(answer)[1]
        return FileVersion(int(total) if total.isdecimal() else -1, self._tag(answer))

    def _tag(self, answer: httpx.Response) -> str:
        linked = [step.headers.get("x-linked-etag") for step in (*answer.history, answer)]
        tag = next(filter(None, linked), None) or answer.headers.get("etag", "")
        return str(tag).removeprefix("W/").strip('"')


class _Hub(_Web):
    """A file on the Hub: its version from huggingface_hub, its bytes as from any web server.

    huggingface_hub's own reading waits without an end and cannot be interrupted.
    """

    def __init__(self, path: str, version: FileVersion | None) -> None:
        super().__init__(path, version)
        self.pinned = re.search(r"@[0-9a-f]{40}/", path) is not None  # a commit never changes

    def address(self, retry: Retry, stop: threading.Event | None) -> tuple[str, dict[str, str]]:
        def find() -> str:
            files, _ = _file_system(self.path)
            place = files.resolve_path(self.path)
            if not hasattr(place, "repo_id"):
                return str(files.url(self.path))
            kind, revision = place.repo_type, place.revision
            return hf_hub_url(place.repo_id, place.path, repo_type=kind, revision=revision)

        return _outside(self.path, find, retry, stop), build_hf_headers()

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        def look() -> Any:  # of a commit, one listing serves all files of a folder
            files, _ = _file_system(self.path)
            fresh = not self.pinned
            return files.info(self.path, refresh=fresh, expand_info=fresh)

        info = _outside(self.path, look, retry, stop)
        lfs = info.get("lfs")
        tag = lfs["sha256"] if lfs else info.get("blob_id") or info.get("xet_hash") or ""
        return _version(self.path, info, str(tag))

    def _tag(self, answer: httpx.Response) -> str:
        # The store that the Hub sends one to has tags of its own.
        own = any("x-linked-etag" in step.headers for step in answer.history) or not answer.history
        return super()._tag(answer) if own and not self.pinned else ""


class _Store(Source):
    """A file of any file system that fsspec knows."""

    checked = False

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        def look() -> Any:
            files, name = _file_system(self.path)
            files.invalidate_cache(name)
            return files.info(name)

        info = _outside(self.path, look, retry, stop)
        tag = next((str(info[key]) for key in _TAGS if info.get(key) is not None), "")
        return _version(self.path, info, tag.strip('"'))

    def read(
        self, start: int, end: int, out: io.BytesIO, retry: Retry, stop: threading.Event | None
    ) -> None:
        if self.version is not None and not self.checked:
            self.match(self.stat(retry, stop), end)
            self.checked = True
        for at in range(start, end, _PIECE):
            upto = min(end, at + _PIECE)

            def fetch(at: int = at, upto: int = upto) -> bytes:
                files, name = _file_system(self.path)
                return bytes(files.cat_file(name, start=at, end=upto))

            piece = _outside(self.path, fetch, retry, stop)[: upto - at]
            out.write(piece)
            if at + len(piece) < upto:
                self.match(self.stat(retry, stop), end)
                raise Failed(f"{upto - at - len(piece)} of {upto - at} bytes did not come")


def source_of(path: str, version: FileVersion | None) -> Source:
    """Choose how a path is read."""
    if not is_remote(path):
        return Local(path, version)
    kinds: dict[str, type[Source]] = {"http": _Web, "https": _Web, "hf": _Hub}
    kind = _Store if "::" in path else kinds.get(path.partition("://")[0].lower(), _Store)
    return kind(path, version)


def _version(path: str, info: Any, tag: str) -> FileVersion:
    if info["type"] == "directory":
        raise FileLostError(path, "is a folder")
    if info.get("size") is None:
        raise DataError(f"{redacted(path)}: the file system names no size of the file")
    return FileVersion(int(info["size"]), tag)


def _range(answer: httpx.Response) -> tuple[int, str]:
    """The first byte of an answer, -1 where it names none, and the size of the file, or ''."""
    found = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d*)", answer.headers.get("content-range", ""))
    return (int(found[1] or -1), found[2]) if found else (-1, "")


def _by_status(path: str, status: int, headers: Any) -> Exception:
    if status in _BUSY or status >= 500:
        return Failed(f"HTTP {status}", _asked_to_wait(headers))
    hint = {401: ": it asks for a login or a token", 403: ": no permission"}.get(status, "")
    return FileLostError(path, f"HTTP {status}{hint}")


def _asked_to_wait(headers: Any) -> float:
    """Seconds from Retry-After, or from the Hub's own header."""
    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after)
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            return 0.0
    found = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
    return float(found[1]) if found else 0.0


def _steady(chunks: Iterator[bytes], stall: float, stop: threading.Event | None) -> Iterator[bytes]:
    """Pass chunks on while they come fast enough."""
    since, size = time.monotonic(), 0
    for chunk in chunks:
        check_cancelled(stop)
        yield chunk
        size += len(chunk)
        seconds = time.monotonic() - since
        if seconds > stall:
            if size < SLOWEST * seconds:
                raise Failed(f"too slow: {size} bytes in {seconds:.0f} s")
            since, size = time.monotonic(), 0


def _outside(path: str, call: Callable[[], T], retry: Retry, stop: threading.Event | None) -> T:
    """Ask a file system that raises errors of its own, and may try again on its own."""
    try:
        return run_in_thread(call, stop, retry.stall + _INNER)
    except (InterruptedError, Failed):
        raise
    except _FINAL as error:
        raise FileLostError(path, cause(error)) from None
    except OfflineModeIsEnabled as error:
        raise DataError(f"{redacted(path)}: {cause(error)}") from None
    except Exception as error:  # every file system has its own
        answer = getattr(error, "response", None)
        status = getattr(answer, "status_code", None)
        if isinstance(status, int):
            raise _by_status(path, status, getattr(answer, "headers", {})) from None
        wrong = (ImportError, ValueError, TypeError, AttributeError, NotImplementedError)
        if isinstance(error, wrong) and not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{redacted(path)}: cannot be opened: {cause(error)}") from None
        raise Failed(cause(error)) from error


_clients: dict[int, httpx.Client] = {}  # of each process, which shares no connection with a fork
_file_systems: dict[tuple[int, str, str], tuple[Any, str]] = {}


def _client() -> httpx.Client:
    client = _clients.get(os.getpid())
    if client is None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        new = httpx.Client(
            follow_redirects=True,
            limits=limits,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [_check_redirect]},
        )
        client = _clients.setdefault(os.getpid(), new)  # one step, so no lock for a fork to inherit
    return client


def _check_redirect(answer: httpx.Response) -> None:
    """Raise _Astray for a redirect to anything but a web address, which asking again cannot mend.

    httpx takes one that it cannot follow for a failure of the network.
    """
    if not answer.is_redirect:
        return
    target = answer.headers.get("location", "")
    try:
        found = answer.url.join(target)
    except httpx.InvalidURL:
        raise _Astray("the server redirects to what is no address") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise _Astray(f"the server redirects to {found.scheme}://, which is not followed")


def _file_system(path: str) -> tuple[Any, str]:
    """A path's file system, one for all threads (fsspec has one for each), and its name there."""
    chain = path if "::" in path else ""
    key = (os.getpid(), path.partition("://")[0], chain or host_of(path))
    if key not in _file_systems:
        new = (HfFileSystem(), "") if key[1] == "hf" else fsspec.core.url_to_fs(path)
        _file_systems.setdefault(key, new)
    files, name = _file_systems[key]
    return files, name if chain else files._strip_protocol(path)
