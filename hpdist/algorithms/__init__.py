"""The algorithms, one file each. `base` is the contract; a new one needs only its own file."""

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.fixmatch import FixMatch
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.supervised import Supervised

__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "FixMatch",
    "FreeMatch",
    "LossTerms",
    "StudentOutputs",
    "Supervised",
    "Views",
    "WeakOutputs",
]
