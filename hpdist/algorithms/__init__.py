"""The algorithms, one file each. `base` is the contract; a new one needs only its own file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    Places,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.fixmatch import FixMatch
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.ict import ICT
from hpdist.algorithms.mean_teacher import MeanTeacher
from hpdist.algorithms.mixmatch import MixMatch
from hpdist.algorithms.pi_model import PiModel
from hpdist.algorithms.remixmatch import ReMixMatch
from hpdist.algorithms.supervised import Supervised
from hpdist.algorithms.temporal_ensembling import TemporalEnsembling
from hpdist.config import components

__all__ = [
    "ICT",
    "Algorithm",
    "AlgorithmConfig",
    "FixMatch",
    "FreeMatch",
    "LossTerms",
    "MeanTeacher",
    "MixMatch",
    "PiModel",
    "ReMixMatch",
    "StudentOutputs",
    "Supervised",
    "TemporalEnsembling",
    "Views",
    "WeakOutputs",
    "catalogue",
]

_CLASSES = (5, 7)  # two numbers of classes: a size that follows them is a multiple of C
_ROWS = (11, 13)  # two unlabelled global batches: the same of B
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
        "Views: of an unlabelled row. C: number of classes. N: unlabelled rows seen so far. B:",
        "unlabelled rows of the global batch. Reduced: floats summed over the ranks per optimizer",
        "step, besides the gradients and three counts of rows; 'then' begins a second collective.",
    ]


def _row(name: str, config: type[AlgorithmConfig]) -> tuple[str, ...]:
    small, large = (config(name=name).build(classes) for classes in _CLASSES)
    names = {
        "weak": "weak",
        "student_weak": "weak for the student",
        "strong": "strong",
        "strong_labeled": "strong of labelled rows",
    }
    counts = {kind: getattr(small.views, field) for field, kind in names.items()}
    views = [f"{count} {kind}" for kind, count in counts.items() if count]
    views += ["targets by the teacher"] if small.views.teacher else []
    views += [] if type(small).mix is Algorithm.mix else ["mixed"]
    tensors, others = small.state_dict(), large.state_dict()
    state = [f"{key} [{_shape(tensors[key], others[key])}]" for key in tensors]
    both = zip(*map(_reduced, (small, large), _CLASSES, _ROWS), strict=True)
    reduced = [_total(*sums) for sums in both]
    return (
        name,
        small.paper or "-",
        ", ".join(views) or "none",
        ", ".join(state) or "none",
        ", then ".join(total for total in reduced if total) or "0",
    )


def _reduced(algorithm: Algorithm, classes: int, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the algorithm has summed over the ranks: of the weak views, of the student's outputs."""
    logits = torch.zeros(rows, classes)
    labels, count = torch.zeros(rows).long(), torch.tensor(float(rows))
    numbers = torch.arange(rows)
    views = algorithm.views
    places = Places(numbers, numbers, rows, rows, seed=0, step=0)
    others, labeled = (logits,) * (views.weak - 1), logits if views.labeled_targets else None
    weak = WeakOutputs(logits, numbers, others, labeled, labels, places) if views.weak else None
    sums = algorithm.statistics(weak) if weak else {}
    algorithm.observe(sums, count)
    outputs = StudentOutputs(
        labeled=logits,
        labels=labels,
        strong=(logits,) * views.strong,
        weak=weak,
        labeled_rows=count,
        unlabeled_rows=count,
        student_weak=(logits,) * views.student_weak,
        strong_labeled=(logits,) * views.strong_labeled,
    )
    return list(sums.values()), list(algorithm.student_statistics(outputs).values())


def _symbol(small: int, large: int) -> str:
    """What a size follows: C, B, N where it grows from nothing, or nothing."""
    return {_CLASSES: "C", _ROWS: "B", (0, 0): "N"}.get((small, large), "")


def _shape(small: Tensor, large: Tensor) -> str:
    """A shape in symbols: 'C x 3'."""
    pairs = zip(small.shape, large.shape, strict=True)
    return " x ".join(_symbol(*pair) or str(pair[0]) for pair in pairs)


def _total(small: Iterable[Tensor], large: Iterable[Tensor]) -> str:
    """The size of several tensors in symbols: 'BC + 2C + 1'."""
    sizes: Counter[str] = Counter()  # products of symbols, and how often each is there
    for a, b in zip(small, large, strict=True):
        dims = [(x, _symbol(x, y)) for x, y in zip(a.shape, b.shape, strict=True)]
        product = "".join(sorted(symbol for _, symbol in dims))
        sizes[product] += math.prod(size for size, symbol in dims if not symbol)
    terms = {
        product.replace("CC", "C^2"): count
        for product, count in sorted(sizes.items(), key=lambda item: (-len(item[0]), item[0]))
    }
    return " + ".join(f"{n if n > 1 or not p else ''}{p}" for p, n in terms.items())
