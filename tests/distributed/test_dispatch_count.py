"""A step dispatches hardly more operations than the same step in plain torch, and learns the same.

The plain loop has torch's own BatchNorm, and on two ranks DDP and torch's own SyncBatchNorm.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.dispatch_count import Compared, count
from tests.support.ranks import run_ranks

DEPTH, WIDTH, ROWS = 16, 1, 2
MOST = 1.15


@pytest.fixture(scope="module")
def alone() -> Compared:
    return count(DEPTH, WIDTH, ROWS)


@pytest.fixture(scope="module")
def two() -> Compared:
    return run_ranks(2, count, DEPTH, WIDTH, ROWS)[0]


def test_one_process_dispatches_little_more_than_plain_torch(alone: Compared) -> None:
    assert alone.ours.operations.total() <= MOST * alone.plain.operations.total()
    assert alone.ours.collectives.total() == 0


def test_two_ranks_dispatch_little_more_than_ddp(two: Compared) -> None:
    """Nor many more than without those that gloo's all-gather needs, and NCCL's does not."""
    spared = 2 * two.plain.operations["aten.batch_norm_stats.default"]
    assert two.ours.operations.total() <= MOST * two.plain.operations.total()
    assert two.ours.operations.total() <= 1.2 * (two.plain.operations.total() - spared)


def test_two_ranks_have_one_collective_more_than_ddp(two: Compared) -> None:
    assert two.ours.collectives.total() <= two.plain.collectives.total() + 1


@pytest.mark.parametrize("ranks", ["alone", "two"])
def test_what_is_counted_learns_the_same(ranks: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(ranks).difference < 1e-5
