"""Average precision of boxes as COCO measures it, over the rows of all ranks.

The boxes of every rank are gathered, which are small, and `faster-coco-eval`, an implementation of
COCO's own protocol, is given them: average precision at IoU 0.50 to 0.95, interpolated at 101
recalls, of the 100 best boxes of a picture. Source: cocodataset.org, "Detection evaluation".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpdist.distributed.gathered_rows import gathered_rows
from hpdist.errors import ConfigError
from hpdist.tasks.centers import Detections
from hpdist.tasks.metrics import PlainScores, Sums

FloatArray = npt.NDArray[np.float64]

PACKAGE = "faster_coco_eval"
MOST = 100
"""Boxes of a picture that count, best first."""
_AT = {"map_50": 0.5, "map_75": 0.75}
_SIZES = ("small", "medium", "large")
_COLUMNS = 7  # picture, class, x, y, width, height, score


class DetectingTask(Protocol):
    """What the meter asks of a task."""

    @property
    def summarized(self) -> Sequence[str]:
        """The scores that a run's summary has."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes."""
        ...

    def losses(self, logits: Any, labels: Any) -> Tensor:
        """Give the loss of each row."""
        ...

    def label_counts(self, labels: Any) -> Tensor:
        """Count the boxes of each row."""
        ...

    def detections(self, outputs: Any) -> Detections:
        """Give the best boxes of each row."""
        ...


def require_coco() -> None:
    """Raise ConfigError unless the package that measures is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            "task.name: detection measures average precision with faster-coco-eval, which is not "
            "installed: pip install 'hpdist[detection]'"
        )


class CocoScores:
    """Collects boxes that were found and those that are there; see `Meter`."""

    def __init__(self, task: DetectingTask, device: torch.device | str) -> None:
        require_coco()
        self.task = task
        self._sums = Sums({"loss": 1, "boxes": 1}, device)
        self._true = [torch.zeros(0, _COLUMNS, dtype=torch.float64)]
        self._found = [torch.zeros(0, _COLUMNS, dtype=torch.float64)]
        self._pictures = 0

    def add(self, outputs: Any, labels: Any, keep: Tensor) -> None:
        """Take a batch."""
        weight = keep.double()
        self._sums.add("loss", (self.task.losses(outputs, labels).double() * weight).sum())
        self._sums.add("boxes", (self.task.label_counts(labels).double() * weight).sum())
        numbers = self._pictures + keep.long().cumsum(0) - 1  # of each row that counts
        ends = labels["size"].double().flip(1).repeat(1, 2)[:, None]  # width and height, twice
        there = labels["there"] & keep[:, None]
        ones = torch.ones_like(there, dtype=torch.float64)
        self._true.append(_table(numbers, labels["boxes"] * ends, labels["classes"], ones, there))
        best = self.task.detections(outputs)
        every = keep[:, None] & (best.scores > 0)
        self._found.append(_table(numbers, best.boxes * ends, best.classes, best.scores, every))
        self._pictures += int(keep.sum())

    def result(self) -> PlainScores:
        """Give the scores of all ranks' rows, the loss last. Collective."""
        sums = self._sums.total()
        counts = [int(one) for one in gathered_rows(torch.tensor([self._pictures]))]
        true, found = (
            _numbered_on(gathered_rows(torch.cat(parts)), counts)
            for parts in (self._true, self._found)
        )
        values = average_precisions(true, found, sum(counts), self.task.class_names)
        loss = float(sums["loss"]) / max(1.0, float(sums["boxes"]))
        return PlainScores({**values, "loss": loss}, tuple(self.task.summarized))


def average_precisions(
    true: FloatArray, found: FloatArray, pictures: int, names: Sequence[str]
) -> dict[str, float]:
    """Measure boxes as COCO does.

    Args:
        true: The boxes that are there, [boxes, 7]: picture, class, x, y, width and height in
            pixels, and 1.
        found: Those that were found, with their scores in place of 1.
        pictures: How many there are, with boxes or without.
        names: Those of the classes.

    Returns:
        `map`, the mean over classes and over IoU 0.50 to 0.95; `map_50` and `map_75` at one IoU;
        `map_small`, `map_medium` and `map_large` of boxes below 32 x 32 and from 96 x 96 pixels on;
        `map/CLASS` of each class. The first three are NaN where there is no box at all; a size or
        a class of which there is no box has no score.

    """
    precision = _precision(*_in_order(true, found, pictures), pictures, len(names))
    thresholds = np.linspace(0.5, 0.95, 10)
    values = {"map": _mean(precision[:, :, :, 0])}
    for name, threshold in _AT.items():
        values[name] = _mean(precision[np.isclose(thresholds, threshold), :, :, 0])
    parts = {f"map_{name}": precision[..., size] for size, name in enumerate(_SIZES, 1)}
    parts |= {f"map/{name}": precision[:, :, number, 0] for number, name in enumerate(names)}
    return values | {name: _mean(part) for name, part in parts.items() if (part > -1).any()}


def _precision(true: FloatArray, found: FloatArray, pictures: int, classes: int) -> FloatArray:
    """Give COCO's table, [IoU thresholds, recalls, classes, sizes]; -1 where there are no boxes."""
    if not len(true):
        return np.full((10, 101, classes, 1 + len(_SIZES)), -1.0)
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = [
        {
            "id": number,
            "image_id": int(row[0]),
            "category_id": int(row[1]),
            "bbox": row[2:6].tolist(),
            "area": float(row[4] * row[5]),
            "iscrowd": 0,
        }
        for number, row in enumerate(true, 1)
    ]
    truth = COCO(
        {
            "images": [{"id": number} for number in range(pictures)],
            "categories": [{"id": number} for number in range(classes)],
            "annotations": annotations,
        }
    )
    results = [
        {
            "image_id": int(row[0]),
            "category_id": int(row[1]),
            "bbox": row[2:6].tolist(),
            "score": float(row[6]),
        }
        for row in found
    ]
    if not results:
        results = [{"image_id": 0, "category_id": 0, "bbox": [0.0, 0.0, 0.0, 0.0], "score": 0.0}]
    evaluation = COCOeval_faster(truth, truth.loadRes(results), iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    table: FloatArray = np.asarray(evaluation.eval["precision"])[:, :, :, :, -1]
    return table


def _mean(table: FloatArray) -> float:
    there = table[table > -1]
    return float(there.mean()) if there.size else float("nan")


def _table(
    numbers: Tensor, boxes: Tensor, classes: Tensor, scores: Tensor, there: Tensor
) -> Tensor:
    """Give the boxes of a batch that are there, float64 [boxes, 7] on the CPU."""
    rows, at = there.nonzero(as_tuple=True)
    corners = boxes[rows, at].double()
    own = [numbers[rows, None], classes[rows, at, None], corners[:, :2]]
    own += [corners[:, 2:] - corners[:, :2], scores[rows, at, None]]
    return torch.cat([part.double() for part in own], dim=1).cpu()


def _numbered_on(parts: Sequence[Tensor], counts: Sequence[int]) -> FloatArray:
    """Put the boxes of all ranks together, whose pictures are numbered on from rank to rank."""
    starts = np.cumsum([0, *counts[:-1]])
    moved = [part.numpy().copy() for part in parts]
    for part, start in zip(moved, starts, strict=True):
        part[:, 0] += start
    return np.concatenate(moved)


def _in_order(true: FloatArray, found: FloatArray, pictures: int) -> tuple[FloatArray, FloatArray]:
    """Order pictures and boxes by what they hold, and number the pictures again.

    Between equal scores the first box counts first: so it is the same on any number of ranks.
    """
    own = [[_sorted(each) for each in _by_picture(part, pictures)] for part in (true, found)]
    pairs = sorted(zip(*own, strict=True), key=lambda pair: (pair[0].tobytes(), pair[1].tobytes()))
    made = []
    for side in range(2):
        parts = [
            np.concatenate([np.full((len(pair[side]), 1), float(number)), pair[side]], axis=1)
            for number, pair in enumerate(pairs)
        ]
        made.append(np.concatenate(parts) if parts else np.zeros((0, _COLUMNS)))
    return made[0], made[1]


def _by_picture(rows: FloatArray, pictures: int) -> list[FloatArray]:
    ordered = rows[np.argsort(rows[:, 0], kind="stable")]
    ends = np.searchsorted(ordered[:, 0], np.arange(pictures), side="right")
    return np.split(ordered[:, 1:], ends[:-1])


def _sorted(rows: FloatArray) -> FloatArray:
    ordered: FloatArray = np.ascontiguousarray(rows[np.lexsort(rows.T)])
    return ordered
