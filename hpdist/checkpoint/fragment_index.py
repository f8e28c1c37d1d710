"""Which file of a checkpoint has which elements, in few numbers for any number of ranks.

    "fragments": {"master": {"first.weight": "0:4096:0:64 262144:100:64:1"}}

Engines cut what they shard in a regular way: neighbouring elements lie on neighbouring ranks, in
fragments of equal length. `start:length:rank:count` stands for `count` such fragments: number i has
the elements from start + i * length on, and lies in the file of rank + i. So the index of a
thousand ranks grows with the number of names plus that of ranks, and not with their product.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import NamedTuple

Run = tuple[int, int, int, int]
"""Start, length, rank and count."""
Encoded = dict[str, dict[str, str]]
"""By kind, then by name."""

_by_start = itemgetter(0)


class Span(NamedTuple):
    """A saved fragment: its elements, and the rank whose file it is in."""

    start: int
    length: int
    rank: int


def key_of(kind: str, name: str, start: int) -> str:
    """The key of a fragment in its file."""
    return f"{kind}/{name}@{start}"


class FragmentIndex:
    """The places of the fragments of a checkpoint, by kind and by name."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, list[Run]]] = {}
        self._unordered: set[tuple[str, str]] = set()

    def add(self, kind: str, name: str, run: Run) -> None:
        """Add fragments; of one without elements only the name is kept."""
        runs = self._runs.setdefault(kind, {}).setdefault(name, [])
        start, length, rank, count = run
        if not length or not count:
            return
        if runs:
            begun, each, first, known = runs[-1]
            end = begun + each * known
            if (end, each, first + known) == (start, length, rank):
                runs[-1] = (begun, each, first, known + count)
                return
            if start < end:
                self._unordered.add((kind, name))
        runs.append(run)

    def add_key(self, key: str, length: int, rank: int) -> None:
        """Add the fragment that has this key, as `key_of` made it, in a rank's file."""
        kind, _, place = key.partition("/")
        name, _, start = place.rpartition("@")
        self.add(kind, name, (int(start), length, rank, 1))

    def include(self, encoded: Mapping[str, Mapping[str, str]], ranks: int) -> None:
        """Add what `encoded` gave. Raises ValueError if it is not of fragments on so many ranks."""
        for kind, names in encoded.items():
            for name, text in names.items():
                self._runs.setdefault(kind, {}).setdefault(name, [])
                for run in text.split():
                    start, length, rank, count = map(int, run.split(":"))
                    if min(start, length, rank, count) < 0 or rank + count > ranks:
                        raise ValueError(f"{kind} of {name!r} has no fragments like {run}")
                    self.add(kind, name, (start, length, rank, count))

    def encoded(self) -> Encoded:
        """Return all of it as JSON."""
        return {
            kind: {
                name: " ".join(":".join(map(str, run)) for run in self._ordered(kind, name))
                for name in names
            }
            for kind, names in self._runs.items()
        }

    def kinds(self) -> set[str]:
        """The kinds of fragments."""
        return set(self._runs)

    def names(self, kind: str) -> list[str]:
        """The names that have fragments of a kind."""
        return list(self._runs.get(kind, ()))

    def holds(self, kind: str, name: str) -> bool:
        """Whether a name has fragments of a kind, be they without elements."""
        return name in self._runs.get(kind, {})

    def rename(self, kind: str, names: Mapping[str, str]) -> None:
        """Give the fragments of a kind other names, by their present ones."""
        runs = {new: self._ordered(kind, old) for old, new in names.items()}
        self._runs[kind] = runs

    def size(self, kind: str, name: str) -> int:
        """Where the last fragment of a name ends; 0 if there is none."""
        runs = self._ordered(kind, name)
        return max((start + length * count for start, length, _, count in runs), default=0)

    def spans(self, kind: str, name: str, start: int, stop: int) -> Iterator[Span]:
        """The fragments that have any of some elements, in order."""
        runs = self._ordered(kind, name)
        # Fragments do not overlap, so the first one needed is in the last run that begins by then.
        number = max(bisect_right(runs, start, key=_by_start) - 1, 0)
        while number < len(runs) and runs[number][0] < stop:
            begun, length, rank, count = runs[number]
            first = max((start - begun) // length, 0)
            last = min((stop - 1 - begun) // length, count - 1)
            for i in range(first, last + 1):
                yield Span(begun + i * length, length, rank + i)
            number += 1

    def _ordered(self, kind: str, name: str) -> list[Run]:
        """The runs of a name by their start, as few as there can be."""
        runs = self._runs.get(kind, {}).get(name, [])
        if (kind, name) in self._unordered:
            self._unordered.remove((kind, name))
            spans = [
                (start + i * length, length, rank + i, 1)
                for start, length, rank, count in runs
                for i in range(count)
            ]
            self._runs[kind][name] = []
            for run in sorted(spans):
                self.add(kind, name, run)
            self._unordered.discard((kind, name))  # damaged ones may overlap
            runs = self._runs[kind][name]
        return runs
