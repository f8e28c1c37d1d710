"""What a step's pseudo-labels are like, for the log: their classes, confidence and thresholds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.data.structures import Structure, cat

_FEWEST = 2  # unlabelled rows of a global batch: of one, one class always takes all
_MOST = 1000  # classes; of more, a record would be long


def observed(algorithm: Algorithm, logits: Sequence[Structure], rows: int) -> dict[str, Tensor]:
    """Sums over this rank's rows, to be added up over the ranks.

    `logits` are those of the weak views, [unlabeled, classes] each, or the task's outputs by name;
    `rows` is how many unlabelled rows the global batch has. Nothing where a row is not of one
    class.
    """
    if not logits or rows < _FEWEST:
        return {}
    said = cat(logits)
    counts, confidence = algorithm.task.class_counts(said), algorithm.task.confidence(said)
    if counts is None or confidence is None:
        return {}
    return {"pseudo_labels": counts, "confidence": confidence.sum()}


def summarized(sums: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is said of them: one number each, and one of each class."""
    if not sums:
        return {}, {}
    counts = sums["pseudo_labels"]  # [classes]
    rows = counts.sum().clamp(min=1)
    numbers = {
        "pseudo_label_top_share": counts.max() / rows,
        "confidence": sums["confidence"] / rows,
    }
    return numbers, {"pseudo_labels": counts / rows}


def per_class(algorithm: Algorithm, shares: dict[str, Tensor]) -> dict[str, list[float]]:
    """A number for each class by name: `shares`, and the thresholds of an algorithm that has some.

    Waits for the device; nothing where there are too many classes for a record.
    """
    thresholds = algorithm.class_thresholds
    found = shares if thresholds is None else shares | {"thresholds": thresholds}
    return {name: values.tolist() for name, values in found.items() if len(values) <= _MOST}
