"""The noisy majority of votes (GNMax), plain or with a check that it is clear, and what it costs.

    check = Check(threshold=200, sigma=150)
    chosen = answer(counts, sigma=40, generator=generator, most=500, check=check)
    epsilon_of(cost_of(40, answers=500, check=check, asked=2000), delta=1e-5)

Of a row only argmax_c (n_c + N(0, sigma^2)) is released, with n_c the teachers whose label is c.
One private row changes one teacher, so two of the counts by 1 each: by proposition 8 of Papernot et
al. 2018 (arXiv:1802.08908) an answer is (lambda, lambda / sigma^2) Rényi differentially private for
every lambda. In their Confident-GNMax a row is answered only where max_c n_c + N(0, sigma_1^2)
reaches a threshold; a private row changes the maximum by 1 at most, so that each check, whatever it
finds, costs lambda / (2 sigma_1^2) more. k answers after m checks are (lambda, lambda c) private
with the cost c = k / sigma^2 + m / (2 sigma_1^2), which is (epsilon, delta) differentially private
with epsilon = lambda c + log(1 / delta) / (lambda - 1) (theorem 5 there). Over lambda its least is

    epsilon = c + 2 sqrt(c log(1 / delta)).

This bound does not depend on the votes, so it may be published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpdist.errors import ConfigError

Counts = npt.NDArray[Any]
"""Votes, [rows, classes]."""
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Check:
    """Answers only rows whose largest count, with noise, reaches a threshold."""

    threshold: float
    """Teachers that must agree."""
    sigma: float
    """Standard deviation of the noise on the largest count."""


class Answers(NamedTuple):
    """What is released."""

    asked: int
    """Rows that were looked at, from the first on."""
    rows: Numbers
    """Which of them are answered, int64 [answers]."""
    classes: Numbers
    """Their classes, int64 [answers]."""


def cost_of(sigma: float, answers: int, check: Check | None = None, asked: int = 0) -> float:
    """Give the cost c of so many answers, and of the checks of the rows that were asked for."""
    checks = 0.0 if check is None else asked / (2 * check.sigma**2)
    return answers / sigma**2 + checks


def epsilon_of(cost: float, delta: float) -> float:
    """Give the epsilon of a cost."""
    return cost + 2 * math.sqrt(cost * math.log(1 / delta))


def sigma_for(
    epsilon: float, delta: float, answers: int, check: Check | None = None, asked: int = 0
) -> float:
    """Give the least noise with which so many answers cost no more than (epsilon, delta).

    Raises ConfigError where the checks alone cost more.
    """
    logarithm = math.log(1 / delta)
    rate = epsilon / (math.sqrt(logarithm + epsilon) + math.sqrt(logarithm))
    left = rate * rate - cost_of(1.0, 0, check, asked)
    if left <= 0:
        assert check is not None
        least = math.sqrt(asked / 2) / rate
        raise ConfigError(
            f"--threshold-sigma {check.sigma:g}: the checks of {asked:,} rows alone cost more than "
            f"--epsilon {epsilon:g}; set it above {least:.4g}, or ask fewer --rows"
        )
    return math.sqrt(answers / left)


def noisy_argmax(counts: Counts, sigma: float, generator: np.random.Generator) -> Numbers:
    """Give the class with the most votes after noise, int64 [rows], of counts [rows, classes]."""
    found: Numbers = (counts + generator.normal(0.0, sigma, counts.shape)).argmax(axis=1)
    return found


def answer(
    counts: Counts,
    sigma: float,
    generator: np.random.Generator,
    most: int,
    check: Check | None = None,
) -> Answers:
    """Answer the rows of counts [rows, classes] in their order, until `most` are answered."""
    rows: Numbers = np.arange(len(counts))
    if check is not None:
        sure = counts.max(axis=1) + generator.normal(0.0, check.sigma, len(counts))
        rows = np.flatnonzero(sure >= check.threshold)
    asked = len(counts) if len(rows) <= most else int(rows[most - 1]) + 1
    rows = rows[:most]
    return Answers(asked, rows, noisy_argmax(counts[rows], sigma, generator))
