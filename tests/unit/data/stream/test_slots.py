"""A lane for each slot: exactly once, the same on any number of ranks, and little read twice."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hpdist.data.files.open import Retry
from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.data.stream.functions import RowFunctions
from hpdist.data.stream.index import Index
from hpdist.data.stream.slot_plan import Runs, SlotPlan, choose_slots
from hpdist.data.stream.slots import KIND, SlotReader
from tests.support.parquet_files import ids_of, index_of, write_numbers
from tests.support.reading import read_counts
from tests.support.slot_epoch import Epoch, uneven_groups

RANKS = [1, 2, 3, 5, 7, 8, 16, 64, 100, 256, 512, 1000, 1024]

Row = tuple[int, int, int]  # epoch, row group, row


def rows_of(plan: SlotPlan, position: int, batch: int, start: int, stop: int) -> list[Row]:
    """Follow lanes and turns to their runs, and the runs to their rows."""
    lanes, turns = plan.places(position, batch, start, stop)
    runs = plan.runs_at(lanes, turns)
    assert ((runs.first <= turns) & (turns < runs.stop)).all()
    places = (runs.start + turns - runs.first).tolist()
    found = list(zip(runs.epoch.tolist(), runs.group.tolist(), strict=True))
    orders = {key: row_order(plan, *key) for key in set(found)}
    return [(*key, int(orders[key][place])) for key, place in zip(found, places, strict=True)]


def run_at(plan: SlotPlan, lane: int, turn: int) -> Runs:
    """The run of one lane."""
    return plan.runs_at(np.asarray([lane]), np.asarray([turn]))


def row_order(plan: SlotPlan, epoch: int, group: int) -> np.ndarray:
    """The order in which a row group's rows come, piece by piece."""
    ((starts, places),) = plan.pieces(np.asarray([epoch]), np.asarray([group]))
    sizes = np.diff(places)
    return np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)])


def random_case(seed: int) -> tuple[SlotPlan, int]:
    """Uneven row groups, some of them empty, and a batch that need not divide anything."""
    random = np.random.default_rng(seed)
    group_rows = random.integers(0, 30, random.integers(1, 40)).astype(np.uint32)
    group_rows[0] += 1
    lanes = int(random.integers(1, min(9, int(group_rows.sum()) + 1)))
    return SlotPlan(group_rows, seed, lanes), int(random.integers(1, 50))


@pytest.fixture(params=[4, 256])
def members(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few groups in several classes, and in one; a few pieces in a group."""
    count: int = request.param
    monkeypatch.setattr("hpdist.data.stream.slot_plan._PIECE", 3)
    monkeypatch.setattr("hpdist.data.stream.slot_plan._MEMBERS_OF_A_CLASS", count)
    return count


@pytest.mark.usefixtures("members")
@pytest.mark.parametrize("seed", range(30))
def test_every_row_once_an_epoch_whatever_the_groups_and_the_batch(seed: int) -> None:
    plan, batch = random_case(seed)
    steps = 2 * plan.rows // batch + 1
    sequence = [row for k in range(steps) for row in rows_of(plan, k * batch, batch, 0, batch)]
    everything = {(group, row) for group, n in enumerate(plan.group_rows) for row in range(n)}
    counts = Counter(sequence)
    assert set(counts.values()) == {1}
    for epoch in (0, 1):
        assert {row[1:] for row in counts if row[0] == epoch} == everything
    for number in range(steps):  # nothing of an epoch comes before its turn, or after
        epochs = {row[0] for row in sequence[number * batch : (number + 1) * batch]}
        first, last = number * batch // plan.rows, ((number + 1) * batch - 1) // plan.rows
        assert epochs == set(range(first, last + 1))


@pytest.mark.usefixtures("members")
@pytest.mark.parametrize("seed", range(10))
def test_the_ranks_slices_make_the_same_global_batch_from_any_position(seed: int) -> None:
    plan, batch = random_case(seed)
    for position in np.random.default_rng(seed).integers(0, 3 * plan.rows, 4).tolist():
        whole = rows_of(plan, position, batch, 0, batch)
        for ranks in (1, 2, 3, 7, 16):
            cuts = [rank * batch // ranks for rank in range(ranks + 1)]
            parts = [row for s in pairwise(cuts) for row in rows_of(plan, position, batch, *s)]
            assert parts == whole


@pytest.mark.usefixtures("members")
def test_a_run_gives_its_rows_in_the_order_of_its_turns() -> None:
    plan, _ = random_case(3)
    for lane in range(plan.lanes):
        turn = 0
        for _ in range(20):
            run = run_at(plan, lane, turn)
            assert run.first == turn
            assert run_at(plan, lane, int(run.stop[0]) - 1) == run
            turn = int(run.stop[0])
    one, other = SlotPlan(np.full(40, 9), 0, 4), SlotPlan(np.full(40, 9), 1, 4)
    first = rows_of(one, 0, 360, 0, 360)
    assert first != rows_of(other, 0, 360, 0, 360)
    assert [row[1:] for row in first] != [row[1:] for row in rows_of(one, 360, 360, 0, 360)]


def test_the_rows_of_a_group_come_at_any_time_of_it() -> None:
    """Every row comes in each quarter of its group's turn as often, within five deviations."""
    plan, epochs, rows = SlotPlan(np.full(3, 128), 0, 2), 400, 128
    counts = np.zeros((rows, 4))
    for epoch in range(epochs):
        counts[row_order(plan, epoch, 1), np.arange(rows) * 4 // rows] += 1
    assert np.abs(counts - epochs / 4).max() < 5 * np.sqrt(epochs / 4)


def test_the_order_is_the_same_for_ever(members: int) -> None:
    # Resuming depends on these numbers, of two epochs: they must not change with a release.
    plan = SlotPlan(np.asarray([3, 5, 0, 4, 6, 2, 7, 1, 3]), 11, 4)
    assert [group * 10 + row for _, group, row in rows_of(plan, 0, 62, 0, 62)] == PINNED[members]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """2,400 row groups of 3 to 12 rows: ten for each slot of a batch of 240."""
    sizes = np.random.default_rng(0).integers(3, 13, (4, 600)).tolist()
    return index_of(write_numbers(tmp_path_factory.mktemp("groups"), sizes))


@pytest.fixture(scope="module")
def batches(index: Index) -> list[list[int]]:
    """The global batches of a little more than one epoch, by one rank that nothing disturbs."""
    reader = SlotReader(index, ["x"], "data", 5, 240)
    steps = reader.rows // 240 + 3
    found = [ids_of(reader, number * 240, 240) for number in range(steps)]
    reader.close()
    first = Counter(row for batch in found for row in batch)
    assert set(first) == set(range(reader.rows))  # the epoch's rows, and some of the next one
    return found


@pytest.mark.parametrize(("ranks", "most"), [(7, 1.1), (60, 1.15)])
def test_ranks_read_the_same_batches_and_little_twice(
    index: Index,
    batches: list[list[int]],
    ranks: int,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of ten row groups a slot, and what is read ahead. Were cut groups not shared: 1.24."""
    steps = len(batches) - 3  # of one epoch
    found: list[list[int]] = [[] for _ in range(steps)]
    ratios = []
    for rank in range(ranks):
        reader = SlotReader(index, ["x"], "data", 5, 240)
        with read_counts(monkeypatch) as counts:
            used = 0
            for number in range(steps):
                mine = ids_of(reader, number * 240, 240, ranks, rank)
                found[number] += mine
                used += len(mine)
                assert len(reader._groups) <= 2 * len(mine) + 1  # open ones, and the next
            reader.close()
        ratios.append(counts.rows / used)
    assert found == batches[:steps]
    assert np.mean(ratios) <= most


@pytest.mark.parametrize(
    "batch",
    [
        448,
        *(pytest.param(batch, marks=pytest.mark.slow) for batch in (1024, 1000, 4096, 16_384)),
    ],
)
def test_any_number_of_ranks_up_to_a_quarter_of_the_batch_reads_little_twice(batch: int) -> None:
    """The rank that reads most, of uneven row groups, ten for each slot: the fewest possible."""
    lanes = choose_slots(batch, 10 * batch, 2**18, None)
    assert lanes is not None
    epoch = Epoch(SlotPlan(uneven_groups(10 * batch), 0, lanes))
    assert sum(epoch.rows.tolist()) == epoch.plan.rows
    for ranks in [*(n for n in RANKS if n < batch // 4), batch // 4]:
        assert max(epoch.ratio(batch, rank, ranks) for rank in range(ranks)) <= 1.15


def test_a_resumed_run_on_other_ranks_goes_on_with_the_same_batches(
    index: Index, batches: list[list[int]]
) -> None:
    for ranks, start in [(3, 17), (64, 40), (1, len(batches) - 5)]:
        reader = SlotReader(index, ["x"], "data", 5, 240)
        for number in range(start, start + 4):
            assert ids_of(reader, number * 240, 240, ranks) == batches[number]
        reader.close()


def test_another_batch_goes_on_with_the_lanes_of_the_run(index: Index) -> None:
    """Of every size, and changing from one call to the next, as of a part of several datasets."""
    reader = SlotReader(index, ["x"], "data", 5, 240)
    sequence: list[int] = []
    position = 0
    for batch in (100, 100, 100, 101, 480, 240, 240, 240, 7, 900):
        sequence += (found := ids_of(reader, position, batch, 2))
        assert len(found) == batch
        position += batch
    reader.close()
    assert len(set(sequence)) == position


def test_rows_beyond_the_budget_wait_in_files(
    index: Index, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader = SlotReader(index, ["x"], "data", 5, 240, budget=4_000)
    for number in range(12):
        assert ids_of(reader, number * 240, 240) == batches[number]
        assert reader.spill.held <= 2_000
        assert not list(tmp_path.iterdir())  # they have no names: a kill leaves nothing
    assert reader.spill.spilled > 30_000
    reader.close()


def test_a_full_disk_is_said_once_and_rows_wait_in_memory(
    index: Index,
    batches: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    reader = SlotReader(index, ["x"], "data", 5, 240, budget=4_000)
    for number in range(3):
        assert ids_of(reader, number * 240, 240) == batches[number]
    reader.close()
    assert caplog.text.count("they stay in memory") == 1


def test_a_damaged_row_group_keeps_its_places(tmp_path: Path) -> None:
    paths = write_numbers(tmp_path, [[4] * 20, [4] * 20], compression="none", use_dictionary=False)
    index = index_of(paths)
    reader = SlotReader(index, ["x"], "data", 0, 8)
    whole = [reader.read(position, 8, 0, 8).ids.tolist() for position in range(0, 160, 8)]
    reader.close()
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: len(content) // 4])  # cut off: all of it is lost
    reader = SlotReader(index, ["x"], "data", 0, 8)
    for number, wanted in enumerate(whole):
        rows = reader.read(8 * number, 8, 0, 8)
        reader.prepare(8 * number + 8, 8, 0, 8)
        assert rows.ids.tolist() == wanted
        assert set(rows.unread) == {line for line, row in enumerate(wanted) if row >= 80}
        read = [line for line in range(8) if line not in rows.unread]
        values = pa.Table.take(rows.table, read).column("x").to_pylist()
        assert [int(value[0]) for value in values] == [wanted[line] for line in read]
    reader.close()


def test_64_rows_come_from_as_many_row_groups(index: Index, batches: list[list[int]]) -> None:
    """Drawn at random from all rows they would come from 63; from one batch at least 60."""
    random = np.random.default_rng(0)
    drawn = [random.choice(batch, 64, replace=False) for batch in batches]
    groups = [len(np.unique(np.searchsorted(index.start, ids, side="right"))) for ids in drawn]
    assert np.mean(groups) >= 60


@pytest.mark.parametrize(
    ("batch", "groups", "group_bytes", "budget", "lanes"),
    [
        (4096, 10**6, 2**20, None, 4096),
        (448, 10**4, 2**18, None, 448),
        (448, 4000, 2**18, None, None),  # less than ten row groups a lane
        (64, 10**6, 2**18, None, 128),  # two for each row: 128 row groups are mixed
        (7, 10**6, 2**18, None, 133),
        (64, 1279, 2**18, None, None),
        (64, 10**6, 2**26, None, None),  # windows have as many lanes
        (4096, 10**6, 2**22, None, 1024),  # 4 GB of open row groups, 8 times the budget
        (448, 10**6, 2**27, None, None),
        (448, 10**4, 2**18, 2**30, 448),
    ],
)
def test_lanes_go_by_the_batch_the_groups_and_the_budget(
    batch: int, groups: int, group_bytes: int, budget: int | None, lanes: int | None
) -> None:
    assert choose_slots(batch, groups, group_bytes, budget) == lanes


@pytest.mark.parametrize(("batch", "lanes"), [(24, 24), (24, 72), (24, 12)])
def test_a_rank_takes_its_rows_from_the_same_lanes_in_every_epoch(batch: int, lanes: int) -> None:
    """Where an epoch ends in a batch, too, so that nobody opens a lane of others."""
    plan = SlotPlan(np.full(9, 37), 0, lanes)
    for ranks in (1, 2, 4, 6):
        owners: dict[int, set[int]] = {}
        for rank in range(ranks):
            slots = rank * batch // ranks, (rank + 1) * batch // ranks
            for position in range(0, 100 * batch, batch):
                for lane in plan.places(position, batch, *slots)[0].tolist():
                    owners.setdefault(lane, set()).add(rank)
        assert len(owners) == lanes
        assert all(len(found) == 1 for found in owners.values())


def test_a_run_goes_on_with_the_kind_of_order_that_it_began_with(index: Index) -> None:
    rows = ParquetRows(index, "x", "data", RowFunctions("x"), ("x",), None, Retry())
    fresh = rows.reader(5, 240)
    assert fresh.order()["kind"] == KIND
    older = {"kind": "parquet", "lanes": 16, "groups_per_window": 8}
    for order in (fresh.order(), rows.reader(5, 240, order=older).order()):
        again = rows.reader(5, 960, order=order)
        assert again.order() == order
        again.close()
    with pytest.raises(ValueError, match="lanes cannot be 1000000"):
        rows.reader(5, 240, order=fresh.order() | {"lanes": 1_000_000})
    fresh.close()


# fmt: off
PINNED = {  # row group * 10 + row, by the row groups of a class
    4: [
        64, 65, 66, 61, 62, 63, 60, 0, 82, 80, 81, 50, 51, 70, 44, 45, 80, 81, 30, 31, 32,
        33, 1, 2, 13, 14, 10, 11, 40, 41, 42, 43, 82, 50, 51, 40, 41, 42, 43, 44, 12, 62,
        63, 64, 65, 66, 60, 70, 14, 10, 11, 12, 13, 45, 33, 30, 31, 32, 1, 2, 0, 61,
    ],
    256: [
        80, 81, 82, 40, 41, 42, 43, 44, 82, 80, 81, 70, 62, 63, 64, 65, 0, 1, 2, 30, 31, 32,
        33, 45, 44, 45, 40, 41, 42, 66, 60, 61, 70, 14, 10, 11, 12, 13, 50, 51, 43, 33, 30,
        31, 32, 50, 51, 64, 65, 66, 61, 62, 63, 60, 13, 14, 10, 11, 12, 1, 2, 0,
    ],
}
# fmt: on
