"""Tools for testing code that builds on hpdist.

from hpdist.testing import check_algorithm, run_ranks

def test_my_algorithm():
    check_algorithm(MyAlgorithmConfig(momentum=0.9))

`check_algorithm` checks an algorithm as every algorithm of the catalogue is checked;
`run_ranks` calls a function on real ranks.
"""

from __future__ import annotations

from hpdist.testing.check import AlgorithmError, check_algorithm
from hpdist.testing.ranks import RankError, run_ranks

__all__ = ["AlgorithmError", "RankError", "check_algorithm", "run_ranks"]
