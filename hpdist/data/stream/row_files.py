"""Which file every row of a stream comes from, noted while `datasets` reads it.

    files = RowFiles()
    files.watch(stream)  # then the stream is read from its beginning
    files.describe(7)  # "row 7 (notes/b.jsonl, row 3)"

A stream of `datasets` says neither which file a row is of nor how many rows a file has. It reads
one file after the other, though, so that counting what every file gives says both.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from datasets.iterable_dataset import ArrowExamplesIterable, ExamplesIterable, SelectColumnsIterable

from hpdist.data.kinds import kinds
from hpdist.messages.redaction import redacted

_FILES = ("original_files", "base_files", "tar_paths", "files")
"""What the builders of `datasets` call the files of a shard."""

_OF_FOLDERS = "add_metadata"  # an argument of the builders of folders, where a file is a row

FileStart: TypeAlias = "tuple[str, int]"
_Generate: TypeAlias = "Callable[..., Iterator[tuple[Any, Any]]]"


class RowFiles:
    """The files of a stream that were read so far, and the row of an epoch that each begins with.

    One thread reads at a time; any may ask.
    """

    def __init__(self) -> None:
        self.reading: str | None = None
        """The file that was begun last."""
        self._starts: list[tuple[int, str, bool]] = []  # sorted
        self._rows = 0  # the rows from 0 on that some file is known of

    def watch(self, stream: Any, since: FileStart | None = None, *, begun: bool = False) -> None:
        """Take note of the files of a stream as it is read; nothing is read for it.

        Args:
            stream: An IterableDataset of the caller's own, whose source is changed in place.
            since: The file that a stream is resumed in, and the row that this file begins with.
            begun: Whether the stream is resumed; without `since` nothing can be noted then.

        A stream whose rows are not those of its files one by one, such as a filtered one, is left
        as it is.
        """
        source = stream._ex_iterable
        while isinstance(source, SelectColumnsIterable):
            source = source.ex_iterable
        if begun and since is None:
            return
        first = since or (None, 0)
        if isinstance(source, ArrowExamplesIterable):
            source.generate_tables_fn = self._noting(source.generate_tables_fn, first, len)
        elif isinstance(source, ExamplesIterable):
            source.generate_examples_fn = self._noting(source.generate_examples_fn, first, _one)

    def _noting(
        self, generate: _Generate, first: tuple[str | None, int], count: Callable[[Any], int]
    ) -> _Generate:
        """Wrap the function that reads one file; what precedes the first one is not counted."""
        at: int | None = None if first[0] is not None else first[1]

        def begin(name: str, is_row: bool) -> None:
            nonlocal at
            if at is None and name == first[0]:
                at = first[1]
            if at is not None:
                self._add(at, name, is_row)

        def noting(**shard: Any) -> Iterator[tuple[Any, Any]]:
            nonlocal at
            self.reading = _file_of(shard)
            if self.reading is not None:
                begin(self.reading, False)
            for key, read in generate(**shard):
                name = _row_file(read) if _OF_FOLDERS in shard else None
                if name is not None:
                    begin(name, True)
                if at is not None:
                    at += count(read)
                    self._rows = max(self._rows, at)  # before anybody can ask for these rows
                yield key, read

        return noting

    def _add(self, start: int, name: str, is_row: bool) -> None:
        entry = (start, name, is_row)
        place = bisect_right(self._starts, entry)
        if not place or self._starts[place - 1] != entry:
            insort(self._starts, entry)

    def file_of(self, row: int) -> FileStart | None:
        """Give the file that a row of an epoch is in, and the file's first row, where known."""
        found = self._entry(row)
        return None if found is None else (found[1], found[0])

    def describe(self, row: int) -> str:
        """Name a row by its number, and by its place where that is known."""
        place = self.place(row)
        return f"row {row}" if place is None else f"row {row} ({place})"

    def place(self, row: int) -> str | None:
        """Give the file of a row and which row of it that is, from 0, where both are known."""
        found = self._entry(row)
        if found is None:
            return None
        start, name, is_row = found
        return name if is_row else f"{name}, row {row - start}"

    def _entry(self, row: int) -> tuple[int, str, bool] | None:
        place = bisect_right(self._starts, row, key=lambda entry: entry[0])
        return self._starts[place - 1] if place and row < self._rows else None


def _file_of(shard: Mapping[str, Any]) -> str | None:
    """Give the file that a shard is, where it is one."""
    for key in _FILES:
        files = shard.get(key)
        if isinstance(files, (list, tuple)) and len(files) == 1 and isinstance(files[0], str):
            return redacted(files[0])
    return None


def _row_file(example: Mapping[str | None, Any]) -> str | None:
    """Give the file that is a row of a folder, such as one of pictures or sounds."""
    for kind in kinds():
        value = example.get(kind.folder_column)
        path = value.get("path") if isinstance(value, dict) else value
        if isinstance(path, str):
            return redacted(path)
    return None


def _one(_: Any) -> int:
    return 1
