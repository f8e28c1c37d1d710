"""Batches that are hardly any: every algorithm, alone and with each add-on, stays finite.

What else all must keep to, `hpdist.testing.check_algorithm` asks of them.
"""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpdist.algorithms import Algorithm, AlgorithmConfig
from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.config.component import component_names, components
from tests.support.algorithm_runs import global_batch, run
from tests.support.catalogue import ADDON_SETTINGS, SETTINGS

pytestmark = pytest.mark.sampled

CLASSES = 5
ALGORITHMS = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
ADDONS = cast(dict[str, type[AddOnConfig]], components("addon"))
NAMES = [*component_names("algorithm"), *(f"fixmatch {name}" for name in component_names("addon"))]


def build(name: str, classes: int = CLASSES) -> Algorithm:
    """One whose ramps take four steps, told how much data there is."""
    name, *addons = name.split()
    algorithm = build_algorithm(
        ALGORITHMS[name](name=name, **SETTINGS.get(name, {})),
        [ADDONS[addon](name=addon, **ADDON_SETTINGS.get(addon, {})) for addon in addons],
        classes,
        steps=40,
    )
    algorithm.rows = 32
    algorithm.class_counts = torch.arange(1, classes + 1).float()
    return algorithm


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([(1, 1), (8, 16), (16, 8)]),
    classes=st.sampled_from([2, 3, 7]),
    sharpness=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    one_class=st.booleans(),
    same=st.booleans(),
)
def test_degenerate_batches(
    name: str,
    seed: int,
    rows: tuple[int, int],
    classes: int,
    sharpness: float,
    one_class: bool,
    same: bool,
) -> None:
    """Nothing or everything passes, one class, two, one row, the same row over and over."""
    algorithm = build(name, classes)
    if algorithm.groups is not None and min(rows) < algorithm.groups:
        rows = (algorithm.groups, 2 * algorithm.groups)
    for step in range(3):
        labeled, unlabeled = rows
        batch = global_batch(
            algorithm,
            seed + step,
            labeled=labeled,
            unlabeled=unlabeled,
            classes=classes,
            one_class=one_class,
        )
        batch.student *= sharpness
        if same:
            batch.ids[:] = 7
            for view in (*batch.weak, *batch.strong, *batch.student_weak):
                view[:] = view[0].clone()
        ran = run(algorithm, batch)
        assert all(math.isfinite(value) for value in ran.losses.values()), ran.losses
        parts = [*ran.gradients, *(g for head in ran.head_gradients.values() for g in head)]
        assert all(part.isfinite().all() for part in parts)
        assert all(value.isfinite().all() for value in algorithm.state_dict().values())
        assert -1e-6 <= ran.losses.get("mask_rate", 0) <= 1 + 1e-6
