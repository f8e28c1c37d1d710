"""What every algorithm, alone and with each add-on, must keep to, whatever its formula."""

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
from tests.support.algorithm_runs import global_batch, run, with_nan
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


def snapshot(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in algorithm.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unusable", [(), (0, 3, 4, 5, 13), tuple(range(4, 8)), tuple(range(16))])
def test_ranks_do_not_matter(name: str, unusable: tuple[int, ...]) -> None:
    whole = build(name)
    others = {ranks: build(name) for ranks in (2, 4)}
    for step in range(4):
        batch = global_batch(whole, step, unusable=unusable)
        expected = run(whole, batch)
        for ranks, algorithm in others.items():
            found = run(algorithm, batch, ranks)
            assert found.losses == pytest.approx(expected.losses, rel=1e-5, abs=1e-7)
            pairs = [(expected.inputs, found.inputs), (expected.gradients, found.gradients)]
            pairs += [(v, found.head_gradients[k]) for k, v in expected.head_gradients.items()]
            for ones, manys in pairs:
                for one, many in zip(ones, manys, strict=True):
                    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)
            assert algorithm.state_dict().keys() == whole.state_dict().keys()
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(algorithm.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_final_only_on_commit_and_goes_round(name: str) -> None:
    algorithm, other = build(name), build(name)
    run(algorithm, global_batch(algorithm, 0))
    before = snapshot(algorithm)
    run(algorithm, global_batch(algorithm, 1), commit=False)
    assert_equal(before, algorithm.state_dict())
    other.load_state_dict(before)
    for step in (2, 3):
        batch = global_batch(algorithm, step)
        assert run(algorithm, batch).losses == run(other, batch).losses
    assert_equal(algorithm.state_dict(), other.state_dict())
    with pytest.raises(KeyError, match="nonsense"):
        other.load_state_dict(before | {"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_skipped_leaves_no_trace(name: str) -> None:
    skipping, plain = build(name), build(name)
    for step in range(3):
        run(skipping, global_batch(skipping, step + 100), commit=False)
        batch = global_batch(plain, step)
        assert run(skipping, batch).losses == run(plain, batch).losses
    assert_equal(skipping.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_leaves_no_trace(name: str) -> None:
    algorithm = build(name)
    if not algorithm.views.weak:
        pytest.skip("has no targets")
    run(algorithm, global_batch(algorithm, 0))
    before = snapshot(algorithm)
    run(algorithm, with_nan(global_batch(algorithm, 1)))
    assert_equal(before, algorithm.state_dict())
    assert all(map(math.isfinite, run(algorithm, global_batch(algorithm, 2)).losses.values()))


@pytest.mark.parametrize("name", NAMES)
def test_no_usable_row_is_no_term(name: str) -> None:
    algorithm = build(name)
    if not algorithm.views.uses_unlabeled:
        pytest.skip("uses no unlabelled rows")
    run(algorithm, global_batch(algorithm, 1))
    before = snapshot(algorithm)
    ran = run(algorithm, global_batch(algorithm, 0, unusable=tuple(range(16))))
    assert ran.losses["unsupervised_loss"] == 0
    assert ran.gradients[0].abs().sum() > 0
    assert_equal(before, algorithm.state_dict())


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
