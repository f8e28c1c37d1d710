"""The standard errors that the benchmarks' tables print."""

import pytest

from tests.benchmarks.seeds import caveat, gains, standard_error, with_error


def test_a_mean_has_its_standard_error():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((5 / 3 / 4) ** 0.5)
    assert with_error([94.7, 96.7, 97.0]) == "96.1 ± 0.7"
    assert with_error([0.5, -0.5], 2, sign=True) == "+0.00 ± 0.50"
    assert with_error([50.0]) == "50.0 ± unknown"


def test_a_gain_is_over_the_same_seed():
    assert gains([3.0, 5.0], [1.0, 4.0]) == [2.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        gains([3.0, 5.0], [1.0])


def test_few_seeds_rank_nothing():
    assert "here 3, rank nothing" in caveat(3)
    assert "rank nothing" not in caveat(5)
