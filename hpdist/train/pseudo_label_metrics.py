"""Metrics of a step's pseudo-labels: their classes, confidence and thresholds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.data.structures import Structure, cat

_FEWEST = 2  # unlabelled rows of a global batch: with one row, one class has all
_MOST = 1000  # classes; with more, a record would be too long


def observed(algorithm: Algorithm, logits: Sequence[Structure], rows: int) -> dict[str, Tensor]:
    """Sums over this rank's rows, to be added up over the ranks.

    `logits` are those of the weak views, [unlabeled, classes] each, or the task's outputs by name;
    `rows` is the number of unlabelled rows of the global batch. Empty if a row does not have
    exactly one class.
    """
    if not logits or rows < _FEWEST:
        return {}
    outputs = cat(logits)
    task = algorithm.task
    counts, confidence = task.class_counts(outputs), task.confidence(outputs)
    if counts is None or confidence is None:
        return {}
    return {"pseudo_labels": counts, "confidence": confidence.sum()}


def summarized(sums: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Summarize them: single numbers, and one number for each class."""
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
    """Numbers of each class by name: `shares`, and the algorithm's thresholds if it has any.

    Waits for the device; empty if there are too many classes for a record.
    """
    thresholds = algorithm.class_thresholds
    found = shares if thresholds is None else shares | {"thresholds": thresholds}
    return {name: values.tolist() for name, values in found.items() if len(values) <= _MOST}
