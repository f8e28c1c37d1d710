"""Files of object stores and of every other file system that fsspec knows."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import fsspec  # type: ignore[import-untyped]
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import OfflineModeIsEnabled

from hpdist.data.files.http_status import failure_of_status
from hpdist.data.files.retry import (
    Failed,
    FileLostError,
    FileVersion,
    Retry,
    T,
    cause,
    host_of,
    run_in_thread,
)
from hpdist.data.files.source import FINAL, Source
from hpdist.errors import DataError
from hpdist.messages.redaction import redacted

_PIECE = 4 << 20  # bytes that an object store is asked for at once
_INNER = 60.0  # seconds that a file system may take for its own attempts, over `stall`
_TAGS = (
    *("ETag", "etag", "e_tag", "generation", "md5", "checksum"),
    *("LastModified", "last_modified", "mtime", "updated", "modified", "created"),
)


class Store(Source):
    """A file of any file system that fsspec knows."""

    checked = False

    def stat(self, retry: Retry, stop: threading.Event | None) -> FileVersion:
        """Ask the file system for size and tag."""

        def look() -> Any:
            files, name = file_system(self.path)
            files.invalidate_cache(name)
            return files.info(name)

        info = call_file_system(self.path, look, retry, stop)
        tag = next((str(info[key]) for key in _TAGS if info.get(key) is not None), "")
        return version_of(self.path, info, tag.strip('"'))

    def read(
        self, start: int, end: int, out: io.BytesIO, retry: Retry, stop: threading.Event | None
    ) -> None:
        """Append the range to `out`, piece by piece."""
        if self.version is not None and not self.checked:
            self.match(self.stat(retry, stop), end)
            self.checked = True
        for at in range(start, end, _PIECE):
            upto = min(end, at + _PIECE)

            def fetch(at: int = at, upto: int = upto) -> bytes:
                files, name = file_system(self.path)
                return bytes(files.cat_file(name, start=at, end=upto))

            piece = call_file_system(self.path, fetch, retry, stop)[: upto - at]
            out.write(piece)
            if at + len(piece) < upto:
                self.match(self.stat(retry, stop), end)
                raise Failed(f"{upto - at - len(piece)} of {upto - at} bytes did not come")


def version_of(path: str, info: Any, tag: str) -> FileVersion:
    """Make the version from what a file system reports; raises for a folder or an unknown size."""
    if info["type"] == "directory":
        raise FileLostError(path, "is a folder")
    if info.get("size") is None:
        raise DataError(f"{redacted(path)}: the file system names no size of the file")
    return FileVersion(int(info["size"]), tag)


def call_file_system(
    path: str, call: Callable[[], T], retry: Retry, stop: threading.Event | None
) -> T:
    """Ask a file system that raises errors of its own, and may try again on its own."""
    try:
        return run_in_thread(call, stop, retry.stall + _INNER)
    except (InterruptedError, Failed):
        raise
    except FINAL as error:
        raise FileLostError(path, cause(error)) from None
    except OfflineModeIsEnabled as error:
        raise DataError(f"{redacted(path)}: {cause(error)}") from None
    except Exception as error:  # every file system has its own
        answer = getattr(error, "response", None)
        status = getattr(answer, "status_code", None)
        if isinstance(status, int):
            raise failure_of_status(path, status, getattr(answer, "headers", {})) from None
        wrong = (ImportError, ValueError, TypeError, AttributeError, NotImplementedError)
        if isinstance(error, wrong) and not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{redacted(path)}: cannot be opened: {cause(error)}") from None
        raise Failed(cause(error)) from error


_file_systems: dict[tuple[int, str, str], tuple[Any, str]] = {}


def file_system(path: str) -> tuple[Any, str]:
    """A path's file system, one for all threads (fsspec has one for each), and its name there."""
    chain = path if "::" in path else ""
    key = (os.getpid(), path.partition("://")[0], chain or host_of(path))
    if key not in _file_systems:
        new = (HfFileSystem(), "") if key[1] == "hf" else fsspec.core.url_to_fs(path)
        _file_systems.setdefault(key, new)
    files, name = _file_systems[key]
    return files, name if chain else files._strip_protocol(path)
