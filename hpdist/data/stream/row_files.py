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

from hpdist.redaction import redacted

_FILES = ("original_files", "base_files", "tar_paths")
"""What the builders of `datasets` call the files of a shard."""

FileStart: TypeAlias = "tuple[str, int]"


class RowFiles:
    """The files of a stream that were read so far, and the row of an epoch that each begins with.

    One thread reads at a time; any may ask.
    """

    def __init__(self) -> None:
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
            source.generate_examples_fn = self._noting(
                source.generate_examples_fn, first, lambda _: 1
            )

    def _noting(
        self,
        generate: Callable[..., Iterator[tuple[Any, Any]]],
        first: tuple[str | None, int],
        count: Callable[[Any], int],
    ) -> Callable[..., Iterator[tuple[Any, Any]]]:
        """Wrap the function that reads one file; what precedes the first one is not counted."""
        at: int | None = None if first[0] is not None else first[1]

        def noting(**shard: Any) -> Iterator[tuple[Any, Any]]:
            nonlocal at
            name, is_row = _file_of(shard)
            if at is None and name == first[0]:
                at = first[1]
            if at is not None and name is not None:
                self._add(at, name, is_row)
            for key, read in generate(**shard):
                if at is not None:
                    at += count(read)
                    self._rows = max(self._rows, at)  # before others can ask for these rows
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
        return redacted(name) if is_row else f"{redacted(name)}, row {row - start}"

    def _entry(self, row: int) -> tuple[int, str, bool] | None:
        place = bisect_right(self._starts, row, key=lambda entry: entry[0])
        return self._starts[place - 1] if place and row < self._rows else None


def _file_of(shard: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Give the file that a shard is, and whether it is one row, as a picture is.

    It is None where that is unknown.
    """
    for key in _FILES:
        if isinstance(shard.get(key), list) and len(shard[key]) == 1:
            return str(shard[key][0]), False
    if shard.get("add_metadata") and len(shard.get("metadata_files", ())) == 1:
        return _named(shard["metadata_files"][0]), False
    files = shard.get("files")
    if isinstance(files, list) and len(files) == 1:
        return _named(files[0]), isinstance(files[0], tuple) and len(files[0]) == 2
    return None, False


def _named(file: Any) -> str | None:
    parts = file if isinstance(file, tuple) else (file,)
    return next((part for part in parts if isinstance(part, str)), None)
