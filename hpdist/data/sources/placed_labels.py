"""Labels that have a place in a picture, such as boxes: checked against the picture's size.

A column of boxes is written in pixels of the stored picture, which its own header knows the size
of. Labels are read before any picture is decoded, so this looks at the headers of the rows in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hpdist.data.decode.encoded import Unreadable
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.data.kinds import InputKind
from hpdist.data.sources.classes import StoredLabels
from hpdist.data.sources.label_encoding import Encoding
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError

_AT_ONCE = 64  # rows whose stored pictures are in memory together


@runtime_checkable
class PlacedEncoding(Encoding, Protocol):
    """An encoding whose labels are written in pixels of the row's picture."""

    def place(
        self, labels: Any, sizes: Int64Array, ids: Int64Array, stored: StoredLabels
    ) -> tuple[Any, list[str]]:
        """Give what `encode` gave with places as shares of the picture, and what was noticed.

        Args:
            labels: What `encode` gave, of the rows in use.
            sizes: Height and width of each picture, [rows, 2]; 0 where it cannot be read.
            ids: The rows' numbers in the split, [rows].
            stored: The column, whose messages name rows.

        Raises DataError for labels that cannot be used.
        """
        ...


def place_labels(
    encoding: Encoding,
    labels: Any,
    ids: Int64Array,
    stored: StoredLabels,
    read: Callable[[list[int]], list[Any]],
    kind: InputKind,
    limits: Limits = USUAL_LIMITS,
) -> tuple[Any, list[str]]:
    """Place the labels of the rows in use, where the encoding's have a place; else change nothing.

    `read` gives the stored inputs of rows of the split. Raises DataError where the inputs are no
    pictures, or as `PlacedEncoding.place` does.
    """
    if not isinstance(encoding, PlacedEncoding):
        return labels, []
    sizes = np.zeros((len(ids), 2), np.int64)
    for start in range(0, len(ids), _AT_ONCE):
        values = read(ids[start : start + _AT_ONCE].tolist())
        for line, value in enumerate(values, start):
            sizes[line] = _size(value, kind, limits, stored)
    return encoding.place(labels, sizes, ids, stored)


def _size(value: Any, kind: InputKind, limits: Limits, stored: StoredLabels) -> tuple[int, int]:
    """Give a picture's height and width; 0 where it cannot be read, which decoding will name."""
    if value is None or isinstance(value, Unreadable):
        return 0, 0
    try:
        size = kind.picture_size(value, limits)
    except Exception:  # image libraries raise nearly everything on a damaged file
        return 0, 0
    if size is None:
        raise DataError(
            f"{stored.where}: column {stored.column!r} holds places in a picture, and the input is "
            f"one of {kind.held}; name the column of pictures in {stored.where}.input"
        )
    return size
