"""The algorithms, one file each. `base` is the contract; a new one needs only its own file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from hpdist.algorithms.adamatch import AdaMatch
from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.dash import Dash
from hpdist.algorithms.defixmatch import DeFixMatch
from hpdist.algorithms.entropy_minimization import EntropyMinimization
from hpdist.algorithms.fixmatch import FixMatch
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.mean_teacher import MeanTeacher
from hpdist.algorithms.pseudo_label import PseudoLabel
from hpdist.algorithms.refixmatch import ReFixMatch
from hpdist.algorithms.softmatch import SoftMatch
from hpdist.algorithms.supervised import Supervised
from hpdist.algorithms.uda import UDA, AnnealedUDA
from hpdist.config import components

__all__ = [
    "UDA",
    "AdaMatch",
    "Algorithm",
    "AlgorithmConfig",
    "AnnealedUDA",
    "Dash",
    "DeFixMatch",
    "EntropyMinimization",
    "FixMatch",
    "FreeMatch",
    "LossTerms",
    "MeanTeacher",
    "PseudoLabel",
    "ReFixMatch",
    "SoftMatch",
    "StudentOutputs",
    "Supervised",
    "Views",
    "WeakOutputs",
    "catalogue",
]

_CLASSES = (5, 7)  # two numbers of classes: a size that follows them is a multiple of C
_HEADER = ("name", "paper", "views", "state", "reduced per step")


def catalogue() -> list[str]:
    """A table of every algorithm, as lines, read off the algorithms as their configs build them."""
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    rows = [_HEADER, *(_row(name, config) for name, config in configs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    cells = (zip(row, widths, strict=True) for row in rows)
    table = ["  ".join(text.ljust(width) for text, width in line).rstrip() for line in cells]
    return [
        *table,
        "",
        "Views: of an unlabelled row. C: number of classes. Reduced: floats summed over the ranks",
        "per optimizer step, whatever the batch, besides the gradients and three counts of rows;",
        "'then' begins a second collective.",
    ]


def _row(name: str, config: type[AlgorithmConfig]) -> tuple[str, ...]:
    small, large = (config(name=name).build(classes) for classes in _CLASSES)
    names = {"weak": "weak", "student_weak": "weak for the student", "strong": "strong"}
    counts = {kind: getattr(small.views, field) for field, kind in names.items()}
    views = [f"{count} {kind}" for kind, count in counts.items() if count]
    views += ["targets by the teacher"] if small.views.teacher else []
    state = [f"{key} [{_shape(small.state[key], large.state[key])}]" for key in small.state]
    reduced = [_total(*sums) for sums in zip(_reduced(small, 5), _reduced(large, 7), strict=True)]
    return (
        name,
        small.paper or "-",
        ", ".join(views) or "none",
        ", ".join(state) or "none",
        ", then ".join(total for total in reduced if total) or "0",
    )


def _reduced(algorithm: Algorithm, classes: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the algorithm has summed over the ranks: of the weak views, of the student's outputs."""
    logits = torch.zeros(2, classes)
    count = torch.tensor(2.0)
    weak = WeakOutputs(logits, torch.arange(2)) if algorithm.views.weak else None
    sums = algorithm.statistics(weak) if weak else {}
    algorithm.observe(sums, count)
    views = algorithm.views
    outputs = StudentOutputs(
        labeled=logits,
        labels=torch.zeros(2).long(),
        strong=(logits,) * views.strong,
        weak=weak,
        labeled_rows=count,
        unlabeled_rows=count,
        student_weak=(logits,) * views.student_weak,
    )
    return list(sums.values()), list(algorithm.student_statistics(outputs).values())


def _shape(small: Tensor, large: Tensor) -> str:
    """A shape in terms of C: 'C x 3'."""
    pairs = zip(small.shape, large.shape, strict=True)
    return " x ".join("C" if pair == _CLASSES else str(pair[0]) for pair in pairs)


def _total(small: Iterable[Tensor], large: Iterable[Tensor]) -> str:
    """The size of several tensors in terms of C: '2C + 1'."""
    sizes: Counter[int] = Counter()  # powers of C, and how often each is there
    for a, b in zip(small, large, strict=True):
        dims = list(zip(a.shape, b.shape, strict=True))
        sizes[dims.count(_CLASSES)] += math.prod(x for x, y in dims if (x, y) != _CLASSES)
    powers = {0: "", 1: "C"}
    terms = {powers.get(power, f"C^{power}"): n for power, n in sorted(sizes.items(), reverse=True)}
    return " + ".join(f"{n if n > 1 or not c else ''}{c}" for c, n in terms.items())
