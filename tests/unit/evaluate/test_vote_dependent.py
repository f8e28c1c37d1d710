"""What a vote costs by the votes: by the authors' numbers, by exact divergences, and in words."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from hpdist import cli
from hpdist.evaluate.gnmax import Answers, Check, cost_of, epsilon_of
from hpdist.evaluate.vote_dependent import (
    ORDERS,
    dependent_epsilon,
    divergences,
    log_losing,
    log_rarer,
)
from tests.unit.evaluate.test_vote import write

pytest.importorskip("scipy", reason="the bounds need scipy, which the extra privacy brings")
AUTHORS_ORDERS = np.array([1.5, 2.0, 8.0, 32.0, 100.0])
# Of the released code of the paper, github.com/tensorflow/privacy, research/pate_2018/core.py:
# compute_logq_gaussian(counts, sigma) and rdp_gaussian(that, sigma, AUTHORS_ORDERS).
AUTHORS_VOTES = [
    ([250, *[0] * 9], 40, -10.019228294289038,
     [1.49691286829e-05, 1.52735726276e-05, 2.05891332994e-05, 0.000203454987624, 0.0577198943523]),
    ([30, 200, 20, *[0] * 7], 40, -5.659945978483009,
     [0.00086658827276, 0.000879657829668, 0.00108564173149, 0.00456504949682, 0.0625]),
    ([120, 100, 30, *[0] * 7], 40, -0.6231087931992196,
     [0.0009375, 0.00125, 0.005, 0.02, 0.0625]),
    ([4500, 300, 200], 500, -20.017951484217445,
     [7.29512696107e-11, 7.31149052225e-11, 7.51569586891e-11, 8.49929693852e-11,
      1.36414033229e-10]),
    ([5000, *[0] * 149], 100, -624.4812400486865,
     [7.52007786198e-272, 8.01867138455e-272, 3.23563056121e-271, 1.0715187977e-266,
      1.94339487075e-252]),
    ([30, 0], 3, -27.89403672609739,
     [3.04082895927e-11, 5.07773122204e-11, 0.0116068603894, 3.55555555556, 11.1111111111]),
]  # fmt: skip
# compute_rdp_threshold(compute_logpr_answered(threshold, sigma, [largest]), sigma, …) there.
AUTHORS_CHECKS = [
    (200, 150, 250, [3.33333333333e-05, 4.44444444444e-05, 0.000177777777778, 0.000711111111111,
                     0.00222222222222]),
    (200, 20, 250, [0.001875, 0.00214499112342, 0.00288336279643, 0.0212239839741, 0.125]),
    (200, 20, 100, [1.74794280769e-07, 1.81056611037e-07, 3.3121291592e-07, 4.76701307909e-05,
                    0.12353233718]),
]  # fmt: skip
# core_test.py there: by sigma and order, the -log q above which the bound falls with q ("hand
# calculated" by its authors).
AUTHORS_LIMITS = {
    (1.5, 1.1): 2.8, (1.5, 2.5): 2.6, (1.5, 32): 427,
    (15, 1.1): 4.8, (15, 2.5): 4.0, (15, 32): 4.7, (15, 250): 275,
    (1500, 1.1): 9.6, (1500, 2.5): 8.8, (1500, 32): 6.0, (1500, 250): 4,
    (15000, 1.1): 12, (15000, 2.5): 11.2, (15000, 32): 8.6, (15000, 250): 6.4,
}  # fmt: skip
needs_accounting = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None,
    reason="dp-accounting is not installed: pip install 'hpdist[privacy]'",
)


@pytest.mark.parametrize(("counts", "sigma", "log_q", "expected"), AUTHORS_VOTES)
def test_the_authors_numbers(
    counts: list[int], sigma: float, log_q: float, expected: list[float]
) -> None:
    found = log_losing(np.array([counts, counts]), sigma)
    assert found == pytest.approx([log_q, log_q], rel=1e-12)
    bounds = divergences(found, sigma, AUTHORS_ORDERS)
    assert bounds.shape == (2, 5)
    for row in bounds:
        assert row == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("threshold", "sigma", "largest", "expected"), AUTHORS_CHECKS)
def test_the_authors_numbers_of_checks(
    threshold: float, sigma: float, largest: int, expected: list[float]
) -> None:
    log_q = log_rarer(np.array([largest]), Check(threshold, sigma))
    bounds = divergences(log_q, math.sqrt(2) * sigma, AUTHORS_ORDERS)
    assert bounds[0] == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("sigma", "order"), AUTHORS_LIMITS)
def test_the_bound_falls_from_the_authors_limits_on(sigma: float, order: float) -> None:
    limit = -AUTHORS_LIMITS[sigma, order]
    below = limit - np.log([1.0, 2.0, 4.0, 8.0])
    falling = divergences(below, sigma, np.array([order]))[:, 0]
    assert (np.diff(falling) < 0).all()
    above = np.log(np.exp(limit) + np.array([0.1, 0.2, 0.3, 0.4]))
    assert divergences(above, sigma, np.array([order]))[:, 0] == pytest.approx(order / sigma**2)


def test_no_exact_divergence_of_two_classes_is_larger() -> None:
    """Class 0 wins with Phi(gap / (sqrt(2) sigma)); a neighbour's gap is larger or smaller by 2."""
    from scipy.special import log_ndtr

    sigma, orders = 4.0, np.array([1.5, 2.0, 6.0, 12.0])
    gained = []
    for gap in range(0, 42, 2):
        bound = divergences(log_losing(np.array([[gap, 0]]), sigma), sigma, orders)[0]
        for other in (gap - 2, gap + 2):
            wins, others = (log_ndtr(np.array([g, -g]) / (math.sqrt(2) * sigma))
                            for g in (gap, other))  # fmt: skip
            terms = orders[:, None] * wins + (1 - orders[:, None]) * others
            exact = np.logaddexp(terms[:, 0], terms[:, 1]) / (orders - 1)
            assert (exact <= bound * (1 + 1e-9) + 1e-13).all(), gap
        gained.append((bound < orders / sigma**2).any())
    assert gained[-1]
    assert not gained[0]


@needs_accounting
def test_epsilon_by_the_votes() -> None:
    """The sum of the rows' bounds, converted; no votes at all cost nothing."""
    counts = np.array([[250, 0, 0], [240, 5, 5], [90, 80, 80], [200, 50, 0]] * 50)
    rows = np.arange(len(counts))
    found = Answers(len(rows), rows, np.zeros(len(rows), np.int64))
    check = Check(200.0, 30.0)
    epsilon = dependent_epsilon(counts, found, 40.0, 1e-5)
    total = sum(divergences(log_losing(counts[[r]], 40.0), 40.0)[0] for r in rows)
    best = total + np.log1p(-1 / ORDERS) - np.log(1e-5 * ORDERS) / (ORDERS - 1)
    assert epsilon == pytest.approx(best.min(), rel=1e-9)  # proposition 12 of arXiv:2004.00010
    assert epsilon < 0.8 * epsilon_of(cost_of(40.0, len(rows)), 1e-5)
    checked = dependent_epsilon(counts, found, 40.0, 1e-5, check)
    assert epsilon < checked < epsilon_of(cost_of(40.0, len(rows), check, len(rows)), 1e-5)
    none = Answers(0, rows[:0], rows[:0])
    assert dependent_epsilon(counts, none, 40.0, 1e-5) == 0


@needs_accounting
def test_the_command_says_that_it_is_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 20) for n in range(40)]
    rest = ["--out", str(tmp_path / "out"), "--sigma", "5", "--accounting", "data-dependent"]
    assert cli.main(["vote", *teachers, *rest]) == 0
    public, private = capsys.readouterr().out.splitlines()[1:]
    assert "may be published" in public
    assert "do not publish it" in private
    assert "smooth sensitivity" in private
    shown = [float(line.split("epsilon ")[1].split()[0]) for line in (public, private)]
    assert shown[1] < 0.5 * shown[0]
    record = json.loads((tmp_path / "out" / "_privacy.json").read_text())["privacy"]
    assert record["epsilon"] == pytest.approx(shown[0], rel=1e-3)
    written = "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    assert private.split("epsilon ")[1].split()[0] not in written


@pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is not None, reason="dp-accounting is installed"
)
def test_the_library_is_named_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 5) for n in range(2)]
    rest = ["--out", str(tmp_path / "out"), "--sigma", "5", "--accounting", "data-dependent"]
    assert cli.main(["vote", *teachers, *rest]) == 2
    assert "pip install 'hpdist[privacy]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
