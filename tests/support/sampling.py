"""Which of the tests that hold every algorithm to every property the default run makes.

`@pytest.mark.sampled` says that a test is one of these, and is parametrized by `name`. Each test is
made with a few names, drawn by a seed that is committed, and each name with a test of its module;
`make test-all` makes all. HPDIST_TEST_SEED=… draws others.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import pytest

SEED = 1
LEAST = 5
"""How many names each test is made with, at least."""
SHARE = 0.3
"""The share of a module's pairs of test and name that is made, about."""

Pair = tuple[Hashable, Hashable]


def seed() -> int:
    """Return the seed of this run's sample."""
    return int(os.environ.get("HPDIST_TEST_SEED", SEED))


def left_out(items: Iterable[pytest.Item], seed: int) -> list[pytest.Item]:
    """Return the items of tests marked `sampled` that the sample does not have."""
    modules: dict[str, dict[Pair, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled"):
            pair = (item.originalname, item.callspec.params["name"])
            modules[item.nodeid.split("::")[0]][pair].append(item)
    found = []
    for module, pairs in modules.items():
        kept = sample(list(pairs), f"{seed} {module}")
        found += [item for pair, same in pairs.items() if pair not in kept for item in same]
    return found


def sample(pairs: Sequence[Pair], seed: str) -> set[Pair]:
    """Draw pairs: each first comes with `LEAST` seconds or with all, and each second comes."""
    order = sorted(pairs, key=str)
    random.Random(seed).shuffle(order)
    firsts: dict[Hashable, int] = defaultdict(int)
    seconds: dict[Hashable, int] = defaultdict(int)
    kept = set()
    for first, second in order:
        if firsts[first] < LEAST or not seconds[second] or len(kept) < SHARE * len(order):
            kept.add((first, second))
            firsts[first] += 1
            seconds[second] += 1
    return kept
