"""What compressed files hold is counted while it is read, since a few bytes stand for any number.

    with unpacking(loading.most_unpacked):
        table = datasets.load_dataset("json", data_files="rows.jsonl.gz")

`datasets` opens compressed files through `fsspec`, which has a table of who decompresses what. Each
of its entries is put behind a counter here. The counter asks for nothing outside of `unpacking`, so
that a program that uses hpdist reads its own files as ever.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import fsspec.compression  # type: ignore[import-untyped]

from hpdist.data.files.paths import local_path

USUAL = 512 * 2**20
"""What `data.loading.most_unpacked` is by default."""
FACTOR = 64
"""By how much a file may be compressed where it holds more than the setting."""
_AT_ONCE = 1 << 20  # bytes
SETTING = "data.loading.most_unpacked"

_MOST: ContextVar[int | None] = ContextVar("hpdist_most_unpacked", default=None)


@contextmanager
def unpacking(most: int) -> Iterator[None]:
    """Hold files that this thread opens meanwhile to so many bytes, or 64 times their own."""
    token = _MOST.set(most)
    try:
        yield
    finally:
        _MOST.reset(token)


def most_unpacked() -> int:
    """Give the limit that holds now."""
    found = _MOST.get()
    return USUAL if found is None else found


class UnpackedError(Exception):
    """A file holds more than it may."""


def check_unpacked(size: int, stored: int, most: int) -> None:
    """Raise UnpackedError where so many bytes came out of `stored` ones and are too many."""
    if size > max(most, FACTOR * stored):
        origin = f", from {stored} in the file" if stored else ""
        raise UnpackedError(
            f"it unpacks to more than {max(most, FACTOR * stored)} bytes{origin}; if that is "
            f"right, raise {SETTING}"
        )


def check_archives(files: Iterable[str]) -> None:
    """Hold zip files of this machine to what they say of their members, which end there.

    Raises UnpackedError, which names the file.
    """
    for given in files:
        path = local_path(given)
        if path is None or not os.path.isfile(path) or not zipfile.is_zipfile(path):
            continue
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        try:
            check_unpacked(size, os.path.getsize(path), most_unpacked())
        except UnpackedError as error:
            raise UnpackedError(f"{path} is not read: {error}") from None


class Counted(io.RawIOBase):
    """Reads what another file holds, and raises UnpackedError where that is too much.

    Args:
        inner: The decompressed file.
        stored: Says how many compressed bytes were read so far.
        most: The limit.
        size: Bytes that came before, of other members of the same archive.
    """

    def __init__(self, inner: Any, stored: Callable[[], int], most: int, size: int = 0) -> None:
        super().__init__()
        self._inner = inner
        self._stored = stored
        self._most = most
        self.size = size
        self._before = size

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether one can seek in it."""
        return bool(self._inner.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; what lies between is counted as if it were read."""
        at = int(self._inner.seek(offset, whence))
        self.size = self._before + at
        return at

    def tell(self) -> int:
        """Tell the position."""
        return int(self._inner.tell())

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there is room for."""
        view = memoryview(buffer).cast("B")
        data = self._inner.read(len(view))
        self.size += len(data)
        check_unpacked(self.size, self._stored(), self._most)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close both."""
        if not self.closed:
            self._inner.close()
        super().close()


def _position(file: Any) -> Callable[[], int]:
    """Say how far a file was read; of one that does not tell, that nothing was."""

    def read_so_far() -> int:
        with suppress(Exception):  # every transport has its own
            return int(file.tell())
        return 0

    return read_so_far


def _behind_a_counter(decompress: Callable[..., Any]) -> Callable[..., Any]:
    def opened(infile: Any, mode: str = "rb", **options: Any) -> Any:
        inner = decompress(infile, mode=mode, **options)
        most = _MOST.get()
        if most is None or not mode.startswith("r"):
            return inner
        return io.BufferedReader(Counted(inner, _position(infile), most), _AT_ONCE)

    opened.__wrapped__ = decompress  # type: ignore[attr-defined]
    return opened


def _count_all() -> None:
    for name, decompress in list(fsspec.compression.compr.items()):
        if name not in (None, "zip"):
            fsspec.compression.register_compression(
                name, _behind_a_counter(decompress), [], force=True
            )


_count_all()
