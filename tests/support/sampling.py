"""Which of the tests that hold every algorithm to every property the default run makes.

`@pytest.mark.sampled` says that a test is one of these, and is parametrized by `name`. Each test is
made with a few names, drawn by a seed that is committed, and each name with a test of its module.

`@pytest.mark.sampled(rows="name", columns="stage")` says that a test is a matrix over two of its
parameters: a share of the cells is made, and every row and every column has one of them.

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
    groups: dict[str, dict[Pair, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    options: dict[str, dict[str, float]] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if not isinstance(item, pytest.Function) or marker is None:
            continue
        if any(mark.name == "slow" for mark in item.own_markers):
            continue
        given, values = dict(marker.kwargs), item.callspec.params
        group, pair = item.nodeid.split("::")[0], (item.originalname, values.get("name"))
        if given:
            group = f"{group} {item.originalname}"
            pair = (values[given.pop("rows")], values[given.pop("columns")])
            given = {"least": 1} | given
        groups[group][pair].append(item)
        options[group] = given
    found = []
    for group, pairs in groups.items():
        kept = sample(list(pairs), f"{seed} {group}", **options[group])
        found += [item for pair, same in pairs.items() if pair not in kept for item in same]
    return found


def sample(
    pairs: Sequence[Pair], seed: str, least: float = LEAST, share: float = SHARE
) -> set[Pair]:
    """Draw pairs: each first comes with `least` seconds or with all, and each second comes."""
    order = sorted(pairs, key=str)
    random.Random(seed).shuffle(order)
    firsts: dict[Hashable, int] = defaultdict(int)
    seconds: dict[Hashable, int] = defaultdict(int)
    kept = set()
    needed = share * len(order)
    for first, second in order:
        if firsts[first] < least or not seconds[second]:
            kept.add((first, second))
            firsts[first] += 1
            seconds[second] += 1
    for pair in order:
        if len(kept) >= needed:
            break
        kept.add(pair)
    return kept


def selected(request: pytest.FixtureRequest, *names: str) -> list[tuple[Hashable, ...]]:
    """Return what the tests of this module that will run have for these parameters, in order.

    For a fixture that does the work of many tests at once, and should do no other's.
    """
    found: dict[tuple[Hashable, ...], None] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path:
            values = item.callspec.params if hasattr(item, "callspec") else {}
            if all(name in values for name in names):
                found[tuple(values[name] for name in names)] = None
    return list(found)
