"""Boxes as labels: a column of objects becomes padded tensors, and every bad box has a name.

A row of the column is `{"bbox": [[x, y, width, height], …], "category": [class, …]}`, or a list of
such objects, in pixels of the stored picture. A row becomes, beside those of the set:

    boxes    float32 [most, 4]: x0, y0, x1, y1 as shares of the picture's width and height
    classes  int64 [most]
    there    bool [most]: which of these are boxes, and no padding
    size     float32 [2]: the picture's height and width in pixels

Shares are what resizing (`views.size`) leaves as they are, whatever a picture's own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from hpdist.errors import DataError

if TYPE_CHECKING:
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels
    from hpdist.data.sources.label_encoding import RowNumbers
    from hpdist.data.stream.permute import Int64Array
    from hpdist.data.structures import Arrays

BadBoxes = Literal["refuse", "drop"]
ObjectArray = npt.NDArray[np.object_]

_BOXES, _CLASSES = "bbox", "category"
_CROWD = ("iscrowd", "is_crowd")
_NEEDED = (
    "task.name: detection needs objects, {bbox: [[x, y, width, height], ...] in pixels, "
    "category: [class, ...]}"
)


@dataclass(frozen=True)
class RowObjects:
    """The objects of one row, as the column has them."""

    boxes: Array  # float64 [objects, 4]: x, y, width and height in pixels; NaN where there is none
    numbers: Int64Array  # [objects], the class of each; -1 where it has none of the classes
    crowd: BoolArray  # [objects], whether it stands for many that are not told apart


@dataclass(frozen=True)
class PlacedObjects:
    """The objects of one row that can be learned."""

    boxes: Array  # float64 [objects, 4]: x0, y0, x1 and y1 as shares of the picture
    numbers: Int64Array  # [objects]
    size: tuple[int, int]
    """Height and width of the picture in pixels."""


@dataclass(frozen=True)
class Boxes:
    """Reads a column of objects; its labels have a place (`PlacedEncoding`)."""

    classes: Classes
    bad_boxes: BadBoxes = "refuse"

    @property
    def state(self) -> Mapping[str, Array]:
        """Nothing is measured."""
        return {}

    def check(self, stored: StoredLabels) -> list[str]:
        """Hold another set's column to the classes of the labelled split. Raises DataError."""
        from hpdist.data.sources.classes import check_match

        return check_match(categories_of(stored), self.classes)

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows are null; a row with an empty list is a picture without objects."""
        return np.fromiter((value is None for value in stored.values), bool, len(stored.values))

    def encode(self, stored: StoredLabels, rows: RowNumbers) -> ObjectArray:
        """Give the objects of every row. Raises DataError where a row's lists do not fit."""
        from hpdist.data.sources.classes import number_labels

        used = set(rows)
        numbers = number_labels(categories_of(stored), self.classes)
        found, at = np.empty(len(stored.values), object), 0
        for row, value in enumerate(stored.values):
            boxes, categories, crowd = objects_in(value)
            own = numbers[at : at + len(categories)]
            at += len(categories)
            found[row] = RowObjects(_numbers(boxes), own, np.array(crowd, bool))
            if len(boxes) != len(categories) and row in used:
                reason = f": it has {len(boxes)} boxes and {len(categories)} classes"
                raise DataError(stored.refusal(row, reason))
        return found

    def place(
        self, labels: ObjectArray, sizes: Int64Array, ids: Int64Array, stored: StoredLabels
    ) -> tuple[ObjectArray, list[str]]:
        """Give the boxes as shares of their pictures, and say what was cut or dropped.

        Raises DataError for the first bad box, unless these are to be dropped.
        """
        found, bad = np.empty(len(labels), object), Counter[str]()
        cut, first = 0, ""
        for line, objects in enumerate(labels):
            height, width = sizes[line].tolist()
            if not (height and width):  # it cannot be read, and decoding will name it
                none = np.zeros((0, 4)), np.zeros(0, np.int64)
                found[line] = PlacedObjects(*none, (height, width))
                continue
            corners = _corners(objects.boxes)
            reasons = list(_reasons(objects, corners, (height, width), self.classes))
            for number, reason in enumerate(reasons):
                if reason is None:
                    continue
                if self.bad_boxes == "refuse":
                    raise DataError(_refusal(stored, int(ids[line]), number, objects, reason))
                first = first or f"the first in {stored.describe(int(ids[line]))}"
                bad[reason] += 1
            good = np.array([reason is None for reason in reasons], bool)
            ends = np.array([width, height] * 2, np.float64)
            inside = corners[good].clip(0, ends)
            cut += int((inside != corners[good]).any(axis=1).sum())
            found[line] = PlacedObjects(inside / ends, objects.numbers[good], (height, width))
        return found, _noticed(stored.where, cut, bad, first)

    def class_numbers(self, labels: Any) -> None:
        """Give none: a picture is of no one class."""
        return

    def describe(self, labels: ObjectArray, where: str, *, training: bool) -> list[str]:
        """Say how many boxes of each class there are."""
        from hpdist.data.decode.written import shortened

        counts = np.bincount(
            np.concatenate([each.numbers for each in labels] or [np.zeros(0, np.int64)]),
            minlength=len(self.classes),
        )
        empty = sum(not len(each.numbers) for each in labels)
        pairs = zip(self.classes.names, counts.tolist(), strict=True)
        shown = shortened([f"{count} {name}" for name, count in pairs])
        without = f", {empty} of them without a box" if empty else ""
        return [f"{where}: {len(labels)} pictures{without}; boxes: {shown}"]

    def fitted(self, labels: Any, state: Mapping[str, Array] | None = None) -> Boxes:
        """Give the encoding itself: nothing is measured."""
        return self

    def finish(self, labels: ObjectArray) -> Arrays:
        """Pad the boxes of every row to those of the row that has most."""
        most = max([1, *(len(each.numbers) for each in labels)])
        rows = len(labels)
        made: dict[str, Array] = {
            "boxes": np.zeros((rows, most, 4), np.float32),
            "classes": np.zeros((rows, most), np.int64),
            "there": np.zeros((rows, most), bool),
            "size": np.zeros((rows, 2), np.float32),
        }
        for row, each in enumerate(labels):
            count = len(each.numbers)
            made["boxes"][row, :count] = each.boxes
            made["classes"][row, :count] = each.numbers
            made["there"][row, :count] = True
            made["size"][row] = each.size
        return made


def check_objects(stored: StoredLabels) -> None:
    """Raise DataError unless a column holds objects with boxes and classes."""
    fields = _fields(stored.feature)
    missing = [name for name in (_BOXES, _CLASSES) if name not in fields]
    if missing:
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {stored.feature}, without "
            f"{' and '.join(missing)}; {_NEEDED}"
        )


def categories_of(stored: StoredLabels) -> StoredLabels:
    """Give the classes of all objects of a column, one after another, as a column."""
    check_objects(stored)
    inner = _fields(stored.feature)[_CLASSES]
    flat = [one for value in stored.values for one in objects_in(value)[1]]
    return stored.of(inner, flat)


def objects_in(value: Any) -> tuple[list[Any], list[Any], list[bool]]:
    """Give the boxes and classes of a row, and which of them stand for a crowd."""
    if value is None:
        return [], [], []
    if isinstance(value, Mapping):
        boxes, categories = list(value[_BOXES] or []), list(value[_CLASSES] or [])
        crowd: list[Any] = next((list(value[name]) for name in _CROWD if value.get(name)), [])
    else:
        boxes, categories = ([one[name] for one in value] for name in (_BOXES, _CLASSES))
        crowd = [any(one.get(name) for name in _CROWD) for one in value]
    marks = [bool(mark) for mark in crowd][: len(boxes)]
    return boxes, categories, marks + [False] * (len(boxes) - len(marks))


def _fields(feature: Any) -> Mapping[str, Any]:
    """Give what an object has, by name, as features; nothing where the column holds no objects."""
    from hpdist.data.sources.labels import LISTS

    if isinstance(feature, LISTS):
        feature = feature.feature
        return feature if isinstance(feature, Mapping) else {}
    if not isinstance(feature, Mapping):
        return {}
    return {name: one.feature for name, one in feature.items() if isinstance(one, LISTS)}


def _numbers(boxes: list[Any]) -> Array:
    """Give boxes as float64 [objects, 4]; NaN where one is not four numbers."""
    found = np.full((len(boxes), 4), np.nan)
    for number, box in enumerate(boxes):
        if box is not None and len(box) == 4 and None not in box:
            found[number] = box
    return found


def _corners(boxes: Array) -> Array:
    """Give x0, y0, x1, y1 of boxes x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _reasons(
    objects: RowObjects, corners: Array, size: tuple[int, int], classes: Classes
) -> Iterator[str | None]:
    """Say why each box is bad; None of a good one."""
    height, width = size
    for box, ends, number, crowd in zip(
        objects.boxes, corners, objects.numbers, objects.crowd, strict=True
    ):
        if not np.isfinite(box).all():
            yield "is not four finite numbers"
        elif box[2] <= 0 or box[3] <= 0:
            yield "has no area"
        elif ends[0] >= width or ends[1] >= height or ends[2] <= 0 or ends[3] <= 0:
            yield "lies outside its picture"
        elif number < 0:
            yield f"has none of the {len(classes)} classes ({classes.shown})"
        elif crowd:
            yield "stands for a crowd, which is not supported"
        else:
            yield None


def _refusal(stored: StoredLabels, row: int, number: int, objects: RowObjects, reason: str) -> str:
    shown = ", ".join(f"{value:.6g}" for value in objects.boxes[number])
    return (
        f"{stored.name}: {stored.describe(row)}: box {number} of column {stored.column!r}, "
        f"[{shown}], {reason}; mend it, or set task.bad_boxes: drop"
    )


def _noticed(where: str, cut: int, bad: Counter[str], first: str) -> list[str]:
    lines = []
    if cut:
        lines.append(f"note: {where}: {cut} boxes stick out of their pictures and are cut to them")
    if bad:
        counts = ", ".join(f"{count} that {reason}" for reason, count in bad.items())
        lines.append(f"note: {where}: bad boxes are dropped: {counts}; {first}")
    return lines
