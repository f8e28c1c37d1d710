"""Several datasets as one stream: each gives its share of every global batch, at its own pace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.reader import Reader, Rows

_FINEST = 1000  # parts that a batch's proportions are brought to


class MixedReader:
    """Rows of several readers in fixed proportions, each exactly once in epochs of its own.

    Of any run of rows from the beginning, each part has its share to within a row, so a part's
    position follows from the one position. In a global batch the parts stand one behind the other.

    Args:
        readers: One for each part, which counts its rows.
        weights: How many rows each gives, in proportion.
        offsets: What is added to each part's ids, so that no two parts share one.
    """

    def __init__(
        self, readers: Sequence[Reader], weights: Sequence[float], offsets: Sequence[int]
    ) -> None:
        self._readers = list(readers)
        self._offsets = list(offsets)
        self._counts = whole_weights(weights)
        self._period = sum(self._counts)
        self._prefix = _prefix(self._counts)  # [period + 1, parts]

    @property
    def rows(self) -> int:
        """Rows after which every part has been through all of its own at least once."""
        shares = zip(self._readers, self._counts, strict=True)
        return max(-(-(reader.rows or 0) * self._period // count) for reader, count in shares)

    def order(self) -> dict[str, Any]:
        """The weights, and the order of every part."""
        parts = [reader.order() for reader in self._readers]
        return {"kind": "mixed", "weights": self._counts, "parts": parts}

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch at `position`."""
        parts = []
        for part, (at, size, first, last) in self._shares(position, batch, start, stop):
            rows = self._readers[part].read(at, size, first, last)
            parts.append((part, replace(rows, ids=rows.ids + self._offsets[part])))
        return Rows.mixed(parts)

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Have every part read ahead."""
        for part, share in self._shares(position, batch, start, stop):
            self._readers[part].prepare(*share)

    def resume_point(self, position: int) -> None:
        """Nothing: the position says it all."""
        return

    def describe(self, row: int) -> str:
        """Name the place of a row in its part."""
        part = max(p for p, offset in enumerate(self._offsets) if offset <= row)
        return self._readers[part].describe(row - self._offsets[part])

    def close(self) -> None:
        """Close every part."""
        for reader in self._readers:
            reader.close()

    def _taken(self, position: int) -> Int64Array:
        """How many of the first `position` rows each part gives, [parts]."""
        periods, rest = divmod(position, self._period)
        taken: Int64Array = periods * self._prefix[-1] + self._prefix[rest]
        return taken

    def _shares(
        self, position: int, batch: int, start: int, stop: int
    ) -> list[tuple[int, tuple[int, int, int, int]]]:
        """Give each part that rows [start, stop) touch: position, size of its share, and which."""
        begin, end = self._taken(position), self._taken(position + batch)
        sizes = (end - begin).tolist()
        shares = []
        for part, (size, before) in enumerate(
            zip(sizes, itertools.accumulate(sizes, initial=0), strict=False)
        ):
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                shares.append((part, (int(begin[part]), size, first, last)))
        return shares


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Small whole numbers in these proportions: exactly, or to a thousandth of the whole."""
    total = sum(weights)
    shares = [Fraction(weight / total).limit_denominator(_FINEST) for weight in weights]
    scale = math.lcm(*(share.denominator for share in shares))
    if scale > _FINEST or not all(shares):
        scale = _FINEST
    counts = [max(1, round(share * scale)) for share in shares]
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


def _prefix(counts: Sequence[int]) -> Int64Array:
    """How many of the first n rows of a period each part gives, [period + 1, parts].

    The part that lags furthest behind its share comes next.
    """
    period = sum(counts)
    shares = np.asarray(counts, np.int64)
    taken = np.zeros((period + 1, len(counts)), np.int64)
    for row in range(period):
        lag = shares * (row + 1) - taken[row] * period
        taken[row + 1] = taken[row]
        taken[row + 1, int(np.argmax(lag))] += 1
    return taken
