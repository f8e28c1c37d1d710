"""What the default run leaves out, and how its workers take turns."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from itertools import product
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.support import warm_ranks
from tests.support.sampling import LEAST, SEED, SHARE, sample
from tests.support.turns import held

pytest_plugins = ["pytester"]

PAIRS = list(product(("commit", "skip", "ranks"), [f"algorithm {k}" for k in range(30)]))


@pytest.mark.parametrize("seed", [SEED, 2, 3, 4])
def test_a_sample_has_every_algorithm_and_every_property(seed: int) -> None:
    drawn = sample(PAIRS, str(seed))
    assert drawn <= set(PAIRS)
    assert {name for _, name in drawn} == {name for _, name in PAIRS}
    assert min(Counter(test for test, _ in drawn).values()) >= LEAST
    assert len(drawn) < 2 * SHARE * len(PAIRS)


def test_a_sample_is_its_seed_s_and_not_the_order_s() -> None:
    assert sample(PAIRS, "1") == sample(PAIRS[::-1], "1")
    assert sample(PAIRS, "1") != sample(PAIRS, "2")


def test_a_test_with_few_algorithms_is_made_with_all() -> None:
    few = PAIRS[: LEAST - 1]
    assert sample(few, "1") == set(few)


@pytest.mark.parametrize("seed", [SEED, 2, 3, 4])
def test_a_matrix_has_every_row_and_every_column(seed: int) -> None:
    cells = list(product([f"algorithm {k}" for k in range(12)], (1, 2, 4)))
    drawn = sample(cells, str(seed), least=1, share=0.4)
    assert {name for name, _ in drawn} == {name for name, _ in cells}
    assert {ranks for _, ranks in drawn} == {1, 2, 4}
    assert 12 <= len(drawn) <= 15


def test_a_fixture_does_the_work_of_the_tests_that_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from tests.support.sampling import selected

        @pytest.fixture(scope="module")
        def work(request):
            return selected(request, "name", "stage")

        @pytest.mark.parametrize("stage", [2, 3])
        @pytest.mark.parametrize("name", ["a", pytest.param("b", marks=pytest.mark.slow)])
        def test_it(work, name, stage):
            assert work == [("a", 2), ("a", 3)]

        def test_another():
            pass
        """
    )
    done = pytester.runpytest_inprocess("-m", "not slow", "-p", "no:cacheprovider", "-W", "ignore")
    done.assert_outcomes(passed=3, deselected=2)


def _hold(file: Path, alone: bool, begun: Event, release: Event) -> None:
    with held(file, alone=alone):
        begun.set()
        release.wait(60)


def test_one_that_is_alone_waits_for_the_others_and_they_for_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    signals = [(context.Event(), context.Event()) for _ in range(4)]
    workers = [
        context.Process(target=_hold, args=(tmp_path / "turn", number == 2, *events))
        for number, events in enumerate(signals)
    ]
    (first, _), (second, _), (alone, _), (late, _) = signals
    try:
        for worker, begun in zip(workers[:2], (first, second), strict=True):
            worker.start()
            assert begun.wait(30), "many hold it at once"
        workers[2].start()
        time.sleep(0.3)
        workers[3].start()
        assert not alone.wait(0.3), "it waits for both"
        assert not late.is_set(), "nobody gets past one that waits"
        for _, release in signals[:2]:
            release.set()
        assert alone.wait(30)
        assert not late.wait(0.3)
        signals[2][1].set()
        assert late.wait(30)
    finally:
        for _, release in signals:
            release.set()
        for worker in workers:
            if worker.pid is not None:
                worker.join(30)


def test_ranks_are_warm() -> None:
    """Nothing that tests import changes what the server of ranks has read; else each is spawned."""
    asked = os.environ.get("HPDIST_TEST_START", "forkserver")
    assert warm_ranks.start_method(fresh=False) == asked
