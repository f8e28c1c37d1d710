"""A record's metrics for a tracker: short names, few numbers, for any size of run.

A tracker refuses what is too long for it (a histogram of W&B has at most 512 bars) or has an
invalid name, so nothing here grows with the classes or the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

_GROUPS = {
    "precision": ("loss_scale", "overflows", "overflow"),
    "pseudo-labels": ("mask_rate", "confidence", "pseudo_label_top_share"),
    "stream": ("epoch", "bad_rows", "data_wait"),
    "system": (
        "examples_per_second",
        "examples_per_second_per_rank",
        *(f"examples_per_second_per_rank_{what}" for what in ("min", "median", "max")),
        "slowest_rank",
        "slowest_rank_lag",
        "checkpoint_wait",
    ),
}
_GROUP = {name: group for group, names in _GROUPS.items() for name in names}
_PER_RANK = "_per_rank"  # suffix of lists of ranks, not classes
_FEW = 20  # classes or ranks that have a curve each
_MOST_BARS = 512  # of a histogram of W&B
_MOST_PAIRS = 10_000  # of classes, in a confusion table
_LONGEST = 60  # characters of a class's name in that of a curve
_RESERVED = {"histogram", "mean", "min", "max"}  # names used beside those of classes


def grouped(key: str) -> str:
    """The tracker's name for a number of metrics.jsonl: `group/number`."""
    if "/" in key:
        return key
    if key.startswith(("threshold", "pseudo_label")):
        return f"pseudo-labels/{key}"
    return f"{_GROUP.get(key, 'train')}/{key}"


def curve_names(classes: Sequence[str]) -> list[str]:
    """Names for the curves of classes: their own, without characters that trackers refuse.

    All are different; if necessary, or if empty, a name begins with the class's number.
    """
    plain = [re.sub(r"[^\w.-]+", "_", str(name)).strip("_.")[:_LONGEST] for name in classes]
    taken = {name.casefold() for name in plain}
    if len(taken) == len(plain) and not taken & {"", *_RESERVED}:
        return plain
    return [f"{number}_{name}".rstrip("_") for number, name in enumerate(plain)]


def values_of(record: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers of a record by grouped name; a short list becomes a number for each entry.

    A longer list, of all classes or ranks, becomes its mean, minimum and maximum.
    """
    values: dict[str, Any] = {}
    for key, value in record.items():
        name = grouped(key)
        if isinstance(value, str) or not isinstance(value, Sequence):
            values[name] = value
        elif len(value) <= _FEW:
            of_classes = len(value) == len(classes) and not key.endswith(_PER_RANK)
            names = curve_names(classes) if of_classes else map(str, range(len(value)))
            values |= {f"{name}/{own}": part for own, part in zip(names, value, strict=True)}
        else:
            finite = [part for part in value if _is_finite(part)]
            if finite:
                mean = math.fsum(part / len(finite) for part in finite)
                summary = {"mean": mean, "min": min(finite), "max": max(finite)}
                values |= {f"{name}/{what}": number for what, number in summary.items()}
    return values


def histograms_of(record: Mapping[str, Any]) -> dict[str, tuple[list[float], list[int]]]:
    """A bar for each class or rank of every list; of more than 512, each is the mean of some.

    Returns heights and edges, in classes. Values that are not finite become 0.
    """
    found = {}
    for key, value in record.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            continue
        size = -(-len(value) // _MOST_BARS)
        edges = [*range(0, len(value), size), len(value)]
        spans = (value[start:end] for start, end in pairwise(edges))
        heights = [
            math.fsum(part / len(span) for part in span if _is_finite(part)) for span in spans
        ]
        found[f"{grouped(key)}/histogram"] = (heights, edges)
    return found


def confusion_rows(confusion: Mapping[str, Any]) -> list[list[Any]]:
    """The teacher's confusions as [class, predicted, rows].

    All pairs of up to 100 classes; with more, the most frequent pairs, wrong ones first, and of
    very many classes only wrong ones.
    """
    classes = confusion["classes"]
    if "most_confused" in confusion:
        found = confusion["most_confused"]["teacher"]["pairs"][:_MOST_PAIRS]
        return [[classes[true], classes[predicted], rows] for true, predicted, rows in found]
    counts = confusion["teacher"]
    if len(classes) ** 2 <= _MOST_PAIRS:
        return [
            [classes[true], classes[predicted], count]
            for true, row in enumerate(counts)
            for predicted, count in enumerate(row)
        ]
    pairs = sorted(_pairs(counts), key=lambda pair: (pair[0] == pair[1], -pair[2], pair))
    return [
        [classes[true], classes[predicted], count] for true, predicted, count in pairs[:_MOST_PAIRS]
    ]


def _pairs(counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    for true, row in enumerate(counts):
        for predicted, count in enumerate(row):
            if count:
                yield true, predicted, count


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
