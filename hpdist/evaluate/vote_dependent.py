"""The cost of a noisy majority by the votes themselves: less where the teachers agree.

    epsilon = dependent_epsilon(counts, answers, sigma=40, delta=1e-5)

By theorem 6 of Papernot et al. 2018 (arXiv:1802.08908) an answer whose likeliest class loses with
probability q costs the less the smaller q is. Proposition 7 bounds q by the counts, the sum over
the other classes of erfc((n_max - n_c) / (2 sigma)) / 2; mu_1 and mu_2 of the theorem are those of
proposition 10. Where the theorem does not hold, the bound is that of proposition 8, which does not
depend on the votes.

Such an epsilon is computed of private data and says something about them. It must not be published,
unless noise by its smooth sensitivity (appendix B there) is added, which is not done here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hpdist.errors import ConfigError
from hpdist.evaluate.gnmax import Answers, Check, Counts

Floats = npt.NDArray[np.float64]

ORDERS: Floats = 1 + np.geomspace(0.05, 2000, 300)
"""Rényi orders of which the best is taken."""
_ROWS = 4096  # whose bounds are held at once


def require_accounting() -> None:
    """Raise ConfigError where the library that converts Rényi bounds to an epsilon is missing."""
    try:
        import dp_accounting.rdp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--accounting data-dependent needs dp-accounting ({error}); "
            "pip install 'hpdist[privacy]'"
        ) from error


def dependent_epsilon(
    counts: Counts, found: Answers, sigma: float, delta: float, check: Check | None = None
) -> float:
    """Give the epsilon that answers to rows with counts [rows, classes] cost, by these votes.

    Raises ConfigError where dp-accounting, which converts the bounds, is missing.
    """
    require_accounting()
    from dp_accounting.rdp import compute_epsilon

    divergence = _sum(log_losing(counts[found.rows], sigma), sigma)
    if check is not None:
        largest = counts[: found.asked].max(axis=1)
        # A private row moves one number and not two, as if the noise were sqrt(2) times as large.
        divergence = divergence + _sum(log_rarer(largest, check), math.sqrt(2) * check.sigma)
    epsilon, _ = compute_epsilon(ORDERS.tolist(), divergence.tolist(), delta)
    return float(epsilon)


def log_losing(counts: Counts, sigma: float) -> Floats:
    """Bound log q, that the class with the most votes is not the answer, fp64 [rows]."""
    from scipy.special import log_ndtr, logsumexp  # type: ignore[import-untyped]

    ordered = np.sort(counts.astype(np.float64), axis=1)
    gaps = ordered[:, -1:] - ordered[:, :-1]  # [rows, classes - 1]
    if not gaps.shape[1]:
        return np.full(len(counts), -np.inf)  # the only class is always the answer
    losing: Floats = logsumexp(log_ndtr(-gaps / (math.sqrt(2) * sigma)), axis=1)
    return np.minimum(losing, math.log(1 - 1 / counts.shape[1]))


def log_rarer(largest: Counts, check: Check) -> Floats:
    """Give log q of the less likely outcome of a check of largest counts [rows], fp64 [rows]."""
    from scipy.special import log_ndtr

    rarer: Floats = log_ndtr(-np.abs(largest - check.threshold) / check.sigma)
    return rarer


def divergences(log_q: Floats, sigma: float, orders: Floats = ORDERS) -> Floats:
    """Bound the Rényi divergence of answers by theorem 6, fp64 [rows, orders].

    Args:
        log_q: Bounds on the log of the probability of every other outcome, [rows].
        sigma: Standard deviation of the noise on each of two counts that a private row changes.
        orders: Those of the divergence, [orders].
    """
    plain = np.broadcast_to(orders / sigma**2, (len(log_q), len(orders)))
    fixed = np.isneginf(log_q)[:, None]
    log_q = np.where(fixed[:, 0], -1.0, log_q)[:, None]
    second = sigma * np.sqrt(-log_q)  # mu_2, [rows, 1]
    first = second + 1  # mu_1
    cost_1, cost_2 = first / sigma**2, second / sigma**2
    with np.errstate(all="ignore"):  # of rows to which the theorem does not apply
        limit = (second - 1) * cost_2 - second * (
            np.log1p(1 / (first - 1)) + np.log1p(1 / (second - 1))
        )
        holds = (second > 1) & (orders < first) & (log_q <= limit) & (-log_q > cost_2)
        log_stays = _log1mexp(log_q)  # log(1 - q)
        log_a = log_stays - _log1mexp((log_q + cost_2) * (1 - 1 / second))
        log_b = cost_1 - log_q / (first - 1)
        powers = orders - 1
        total = np.logaddexp(log_stays + powers * log_a, log_q + powers * log_b) / powers
    bound: Floats = np.where(fixed, 0.0, np.where(holds, np.minimum(total, plain), plain))
    return bound


def _sum(log_q: Floats, sigma: float) -> Floats:
    """Sum the bounds of all rows, fp64 [orders]."""
    starts = range(0, len(log_q), _ROWS)
    parts: list[Any] = [divergences(log_q[at : at + _ROWS], sigma).sum(axis=0) for at in starts]
    return np.sum(parts, axis=0) if parts else np.zeros(len(ORDERS))


def _log1mexp(values: Floats) -> Floats:
    """Give log(1 - exp(values)) of negative values, exact near 0 and far from it."""
    found: Floats = np.where(
        values < -1, np.log1p(-np.exp(values)), np.log(-np.expm1(np.maximum(values, -1)))
    )
    return found
