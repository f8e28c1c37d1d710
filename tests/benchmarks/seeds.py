"""What accuracies of a few seeds allow to say: their mean, its standard error, and no ranking."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

ENOUGH = 5
"""Seeds below which a table ranks nothing."""


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None where there is but one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def with_error(values: Sequence[float], places: int = 1, *, sign: bool = False) -> str:
    """The mean and its standard error as text: `95.8 ± 0.4`."""
    error, plus = standard_error(values), "+" if sign else ""
    told = "unknown" if error is None else f"{error:.{places}f}"
    return f"{statistics.mean(values):{plus}.{places}f} ± {told}"


def gains(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """What each seed gains over the baseline of the same seed, which drew the same labels."""
    return [value - base for value, base in zip(values, baseline, strict=True)]


def caveat(seeds: int) -> str:
    """The sentence that a table of so many seeds has above it."""
    numbers = "Numbers are means ± their standard errors over the seeds, in no order of rank."
    if seeds >= ENOUGH:
        return numbers
    return (
        f"{numbers} Fewer than {ENOUGH} seeds, here {seeds}, rank nothing: a standard error of so "
        "few is itself uncertain, and the same seed has moved by 5 points between two machines."
    )
