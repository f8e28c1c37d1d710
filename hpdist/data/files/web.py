"""Files on web servers and on the Hub, read by byte ranges over HTTP."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from hpdist.data.files.http_status import failure_of_status
from hpdist.data.files.retry import (
    SLOWEST,
    Failed,
    FileLostError,
    FileVersion,
    Retry,
    cause,
    check_cancelled,
    run_in_thread,
)
from hpdist.data.files.source import Source
from hpdist.data.files.stores import call_file_system, file_system, version_of
from hpdist.errors import DataError
from hpdist.messages.redaction import redacted

_CONNECT = 10.0  # seconds
_WHOLE = 64 << 20  # bytes of a file that is read whole, where the server knows no ranges


class _Astray(Exception):  # noqa: N818
    """A redirect that leads to no web address."""


class Web(Source):
    """A file on a web server."""

    def address(self, retry: Retry, stop: threading.Event | None) -> tuple[str, dict[str, str]]:
        """Find the URL and the headers to send."""
        return self.path, {}

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        """Ask the server for size and tag with a request for the first byte."""
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
        """Append the range to `out`."""
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
                    raise failure_of_status(self.path, status, answer.headers)
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


class Hub(Web):
    """A file on the Hub: its version from huggingface_hub, its bytes as from any web server.

    huggingface_hub's own reading waits without an end and cannot be interrupted.
    """

    def __init__(self, path: str, version: FileVersion | None) -> None:
        super().__init__(path, version)
        self.pinned = re.search(r"@[0-9a-f]{40}/", path) is not None  # a commit never changes

    def address(self, retry: Retry, stop: threading.Event | None) -> tuple[str, dict[str, str]]:
        """Find the URL on the Hub, and the headers with the user's token."""

        def find() -> str:
            files, _ = file_system(self.path)
            place = files.resolve_path(self.path)
            if not hasattr(place, "repo_id"):
                return str(files.url(self.path))
            kind, revision = place.repo_type, place.revision
            return hf_hub_url(place.repo_id, place.path, repo_type=kind, revision=revision)

        return call_file_system(self.path, find, retry, stop), build_hf_headers()

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        """Ask huggingface_hub for size and tag."""

        def look() -> Any:  # of a commit, one listing serves all files of a folder
            files, _ = file_system(self.path)
            fresh = not self.pinned
            return files.info(self.path, refresh=fresh, expand_info=fresh)

        info = call_file_system(self.path, look, retry, stop)
        lfs = info.get("lfs")
        tag = lfs["sha256"] if lfs else info.get("blob_id") or info.get("xet_hash") or ""
        return version_of(self.path, info, str(tag))

    def _tag(self, answer: httpx.Response) -> str:
        # The store that the Hub sends one to has tags of its own.
        own = any("x-linked-etag" in step.headers for step in answer.history) or not answer.history
        return super()._tag(answer) if own and not self.pinned else ""


def _range(answer: httpx.Response) -> tuple[int, str]:
    """The first byte of an answer, -1 where it names none, and the size of the file, or ''."""
    found = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d*)", answer.headers.get("content-range", ""))
    return (int(found[1] or -1), found[2]) if found else (-1, "")


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


_clients: dict[int, httpx.Client] = {}  # of each process, which shares no connection with a fork


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
