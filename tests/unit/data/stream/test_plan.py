"""The arithmetic of the elastic order: exactly once, and the same rows whatever the ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from hpdist.data.stream.permute import (
    all_shuffled,
    chosen,
    keys_of,
    permutation,
    permuted,
    shuffled,
)
from hpdist.data.stream.plan import MOST_LANES, Plan, choose_lanes

Row = tuple[int, int, int]  # epoch, row group, row


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 65_537])
def test_a_permutation_takes_every_place_once(size):
    assert sorted(permutation(size, 7, size)) == list(range(size))


def test_a_place_is_computed_without_the_others():
    whole = permutation(1000, 3)
    places = np.array([999, 0, 500])
    assert permuted(places, 1000, 3).tolist() == whole[places].tolist()


def test_every_part_of_the_key_matters():
    keys = [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1, 3)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == len(keys)


def test_the_order_is_the_same_for_ever():
    # Resuming depends on these numbers: they must not change with a release.
    assert permutation(8, 0).tolist() == PINNED[0]
    assert permutation(10, 5, 1).tolist() == PINNED[1]


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1000])
def test_a_shuffle_takes_every_place_once_and_never_changes(size):
    assert sorted(shuffled(size, 7, size)) == list(range(size))
    assert shuffled(12, 5, 1).tolist() == SHUFFLED
    assert chosen(16, keys_of((5,), np.arange(6))).tolist() == CHOSEN


def test_many_shuffles_are_those_of_each_key():
    sizes, numbers = np.array([3, 0, 1, 17, 12]), np.array([9, 4, 4, 2, 1])
    found = all_shuffled(sizes, keys_of((5,), numbers))
    each = [
        shuffled(size, 5, number)
        for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True)
    ]
    assert found.tolist() == np.concatenate(each).tolist()


def test_a_shuffle_is_well_mixed():
    """Each row in each place as often, within five deviations, and each key has its own order."""
    size, keys = 20, 2000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), shuffled(size, key)] += 1
    expected = keys / size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert len({tuple(shuffled(size, key)) for key in range(keys)}) == keys


def test_a_permutation_is_well_mixed():
    """Each place goes everywhere equally often: chi-squared over 4,000 keys, 99.99 % bound."""
    size, draws = 10, 4000
    counts = np.zeros((size, size))
    for key in range(draws):
        counts[np.arange(size), permutation(size, key)] += 1
    expected = draws / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 135  # 81 degrees of freedom


def rows_of(plan: Plan, position: int, batch: int, start: int, stop: int) -> list[Row]:
    """Follow the pieces to their windows and the windows to their rows."""
    rows: list[Row] = []
    for piece in plan.pieces(position, batch, start, stop):
        offset = piece.start
        while offset < piece.stop:
            window = plan.window_at(piece.epoch, piece.lane, offset)
            assert window.start <= offset < window.start + window.rows
            flat = [(s.group, row) for s in window.segments for row in range(s.start, s.stop)]
            order = plan.row_order(window)
            end = min(piece.stop, window.start + window.rows)
            rows += [
                (piece.epoch, *flat[order[place - window.start]]) for place in range(offset, end)
            ]
            offset = end
    return rows


def random_case(seed: int) -> tuple[Plan, int]:
    """Uneven row groups, some of them empty, and a batch that need not divide anything."""
    random = np.random.default_rng(seed)
    group_rows = random.integers(0, 30, random.integers(1, 40))
    group_rows[0] += 1
    lanes = int(random.integers(1, min(9, int(group_rows.sum()) + 1)))
    plan = Plan(group_rows, seed, lanes, int(random.integers(1, 5)))
    return plan, int(random.integers(1, 50))


@pytest.mark.parametrize("seed", range(60))
def test_every_row_once_an_epoch_and_the_remainder_first_in_the_next_batch(seed):
    plan, batch = random_case(seed)
    steps = 2 * plan.rows // batch + 1
    sequence = [row for k in range(steps) for row in rows_of(plan, k * batch, batch, 0, batch)]
    counts = Counter(sequence)
    assert set(counts.values()) == {1}
    everything = {(group, row) for group, n in enumerate(plan.group_rows) for row in range(n)}
    for epoch in (0, 1):
        assert {row[1:] for row in counts if row[0] == epoch} == everything
    # What does not fill an epoch's last batch shares one with the next epoch; nothing else does.
    for number in range(steps):
        epochs = {row[0] for row in sequence[number * batch : (number + 1) * batch]}
        first, last = number * batch // plan.rows, ((number + 1) * batch - 1) // plan.rows
        assert epochs == set(range(first, last + 1))


@pytest.mark.parametrize("seed", range(20))
def test_the_ranks_slices_make_the_same_global_batch_from_any_position(seed):
    plan, batch = random_case(seed)
    for position in np.random.default_rng(seed).integers(0, 3 * plan.rows, 4).tolist():
        whole = rows_of(plan, position, batch, 0, batch)
        assert len(whole) == batch
        for ranks in (1, 2, 3, 4, 6, 8, 12, 16):
            cuts = [rank * batch // ranks for rank in range(ranks + 1)]
            slices = pairwise(cuts)
            parts = [row for s in slices for row in rows_of(plan, position, batch, *s)]
            assert parts == whole


@pytest.mark.parametrize("seed", range(20))
def test_the_windows_of_a_lane_follow_one_another(seed):
    plan, _ = random_case(seed)
    for lane in range(plan.lanes):
        if plan.lane_rows(0, lane) == 0:
            continue
        window = plan.window_at(0, lane, 0)
        seen = 0
        while window.epoch == 0:
            assert (window.lane, window.start) == (lane, seen)
            assert len(window.segments) <= plan.groups_per_window
            seen += window.rows
            window = plan.after(window)
        assert seen == plan.lane_rows(0, lane)
        assert window.start == 0
        assert all(plan.lane_rows(epoch, lane) == 0 for epoch in range(1, window.epoch))


@pytest.mark.parametrize("rows", [[37] * 9, [5, 0, 91, 1, 1], [1000]])
def test_a_rank_takes_its_rows_from_the_same_lanes_in_every_epoch(rows):
    """Where an epoch ends in a batch, too, so that nobody opens a window of a lane of others."""
    plan = Plan(np.asarray(rows), 0, 8, 2)
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            slices = [
                (p, 24, rank * 24 // ranks, (rank + 1) * 24 // ranks) for p in range(0, 2400, 24)
            ]
            lanes = {piece.lane for where in slices for piece in plan.pieces(*where)}
            assert lanes == set(range(rank * 8 // ranks, (rank + 1) * 8 // ranks))


def test_epochs_and_seeds_differ():
    groups = np.full(20, 10)
    one, other = Plan(groups, 0, 4, 2), Plan(groups, 1, 4, 2)
    first = [row[1:] for row in rows_of(one, 0, 200, 0, 200)]
    second = [row[1:] for row in rows_of(one, 200, 200, 0, 200)]
    assert first != second
    assert first != [row[1:] for row in rows_of(other, 0, 200, 0, 200)]
    assert sorted(first) == sorted(second)


def test_a_batch_is_drawn_from_many_row_groups():
    """At least 48 distinct row groups in 64 rows, of the 57 that drawing at random would give."""
    groups = np.full(260, 250)
    lanes, per_window = choose_lanes(448, len(groups), 250 * 1024, 64 * 2**20)
    plan = Plan(groups, 0, lanes, per_window)
    found = []
    for number in range(20):
        batch = rows_of(plan, number * 448, 448, 0, 448)
        picked = permutation(448, number)[:64]
        found.append(len({batch[place][1] for place in picked}))
    assert np.mean(found) >= 48


@pytest.mark.parametrize(
    ("batch", "groups", "group_bytes", "budget"),
    [
        (448, 1000, 2**18, 2**29),
        (4096, 1000, 2**18, 2**29),
        (448, 1000, 2**18, 2**24),
        (7, 1000, 2**20, 2**30),
        (127, 4, 2**20, 2**30),
        (1, 1, 1, 1),
    ],
)
def test_lanes_and_windows_keep_to_the_budget(batch, groups, group_bytes, budget):
    lanes, per_window = choose_lanes(batch, groups, group_bytes, budget)
    assert 1 <= lanes <= min(MOST_LANES, groups, batch)
    assert 1 <= per_window <= groups
    assert 2 * lanes * per_window * group_bytes <= max(budget, 2 * group_bytes)


def test_forty_thousand_row_groups_are_planned_at_once():
    """An epoch of 40 million rows takes no list of rows: its plan is of the size of the groups."""
    plan = Plan(np.full(40_000, 1000), 0, 64, 4)
    pieces = plan.pieces(39_999_900, 448, 224, 448)
    assert sum(piece.stop - piece.start for piece in pieces) == 224
    assert all(plan.window_at(p.epoch, p.lane, p.start).rows <= 4000 for p in pieces)


PINNED = [[5, 4, 1, 6, 3, 2, 0, 7], [1, 7, 3, 8, 9, 5, 6, 0, 4, 2]]
SHUFFLED = [10, 6, 4, 7, 0, 1, 9, 8, 2, 3, 11, 5]
CHOSEN = [7, 14, 3, 3, 2, 11]
