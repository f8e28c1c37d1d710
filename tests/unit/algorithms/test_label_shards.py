"""The sharded table of labels against a dict: any ids, ranks, fates of steps, changes of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpdist.algorithms import FlexMatch, WeakOutputs
from hpdist.algorithms.addons.base import AddOn, build_algorithm
from hpdist.algorithms.addons.debiaspl import DebiasPLConfig
from hpdist.algorithms.flexmatch import FlexMatchConfig
from hpdist.algorithms.parts.tables import BLOCK, NEVER, UNSEEN, WholeShards
from hpdist.algorithms.positions import BatchPositions
from hpdist.errors import ConfigError

CLASSES = 3
APPLIED, SKIPPED, UNSOUND, RAISED = "applied", "skipped", "unsound", "raised"

IDS = st.builds(lambda block, at: block * BLOCK + at, st.integers(0, 6), st.integers(0, 3))
ROWS = st.lists(st.tuples(IDS, st.integers(NEVER, CLASSES - 1)), min_size=1, max_size=12)
STEPS = st.lists(
    st.tuples(
        ROWS,
        st.sampled_from([APPLIED, APPLIED, SKIPPED, UNSOUND, RAISED]),
        st.none() | st.integers(1, 4),  # ranks that it goes on with
    ),
    max_size=12,
)


@dataclass
class Model:
    """Labels in a dict."""

    labels: dict[int, int] = field(default_factory=dict)

    def take(self, rows: list[tuple[int, int]]) -> None:
        for row, label in rows:
            before = self.labels.get(row, NEVER)
            self.labels[row] = before if label == NEVER else label

    @property
    def counts(self) -> list[int]:
        return [list(self.labels.values()).count(label) for label in range(CLASSES)]


def made(ranks: int, rows: int | None) -> list[FlexMatch]:
    group = [FlexMatch(CLASSES, rows=rows) for _ in range(ranks)]
    for rank, algorithm in enumerate(group):
        algorithm.bind_rank(rank, ranks)
    return group


def step(group: list[FlexMatch], rows: list[tuple[int, int]], fate: str) -> list[list[int]]:
    """What each rank does with its share of the rows; the counts that its loss went by."""
    sums: dict[str, Tensor] = {}
    for rank, algorithm in enumerate(group):
        positions = torch.arange(len(rows))[rank :: len(group)]
        ids, labels = torch.tensor(rows)[positions].unbind(dim=1)
        at = BatchPositions(torch.arange(0), positions, 0, len(rows), seed=0, step=0)
        weak = WeakOutputs(torch.zeros(len(positions), CLASSES), ids, positions=at)
        told = {"table": algorithm._table.pack(weak, labels)} | algorithm.rank_statistics()
        sums = {name: sums.get(name, 0) + value for name, value in told.items()}
    went_by = []
    for algorithm in group:
        algorithm.observe(sums, torch.tensor(float(len(rows))))
        algorithm.is_finite = torch.tensor(fate != UNSOUND)
        if fate == UNSOUND:
            algorithm.pending = dict(algorithm.state)
        went_by.append(algorithm._used_counts["counts"].tolist())
        if fate != RAISED:
            algorithm.discard() if fate == SKIPPED else algorithm.commit()
    return went_by


def saved(group: list[FlexMatch]) -> tuple[dict[str, Tensor], WholeShards]:
    parts: dict[str, list[tuple[int, Tensor]]] = {"labels": [], "changes": []}
    for algorithm in group:
        for name, own in algorithm.shards().items():
            parts[name] += own
    whole: dict[str, Tensor] = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        assert [at for at, _ in found] == [
            sum(len(p) for _, p in found[:i]) for i in range(len(found))
        ], "neither holes nor overlaps"
        whole[name] = torch.cat([part for _, part in found]) if found else torch.empty(0)
    return group[0].state_dict(), WholeShards(whole)


def moved(group: list[FlexMatch], after: list[FlexMatch]) -> list[FlexMatch]:
    """Others, or the same, with what a group holds."""
    state, shards = saved(group)
    state.pop("labels", None)
    for algorithm in after:
        algorithm.load_state_dict(state, shards)
    return after


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.none() | st.integers(1, 3 * BLOCK), STEPS)
def test_it_is_a_dict(ranks, rows, plan):
    group, model = made(ranks, rows), Model()
    for used, fate, other in plan:
        assert step(group, used, fate) == [model.counts] * len(group)
        if fate == APPLIED:
            model.take(used)
        if other is not None:
            after = group if other == len(group) else made(other, rows)  # as after a rollback
            group = moved(group, after)
        (alone,) = moved(group, made(1, rows))
        state = alone.state_dict()
        assert state["counts"].tolist() == model.counts
        assert state["seen"] == len(model.labels)
        labels = state["labels"]
        assert labels.dtype == torch.int16
        known = (labels != UNSEEN).nonzero().flatten().tolist()
        assert {row: int(labels[row]) for row in known} == model.labels
        assert len({str(a.state) for a in group}) == 1
        for rank, algorithm in enumerate(group):
            table = algorithm._table
            own = [row for row in range(table.rows) if row // BLOCK % len(group) == rank]
            assert len(table.labels()) == len(own)


def test_a_state_of_one_rank_is_dealt_out_when_the_place_is_taken():
    (alone,) = made(1, None)
    step([alone], [(1, 0), (BLOCK + 2, 1)], APPLIED)
    state = alone.state_dict()
    late, early = made(2, None), [FlexMatch(CLASSES) for _ in range(2)]
    for rank in range(2):
        early[rank].load_state_dict(state)
        early[rank].bind_rank(rank, 2)
        late[rank].load_state_dict(state)
        parts = [dict(group[rank].shards()["labels"]) for group in (early, late)]
        assert parts[0].keys() == parts[1].keys() == {rank * BLOCK}
        assert torch.equal(*(part[rank * BLOCK] for part in parts))
        assert parts[0][rank * BLOCK][1 + rank] == rank


def test_a_place_cannot_change_and_a_part_is_no_whole():
    first, second = made(2, None)
    first.bind_rank(0, 2)  # once more, as by another step around it
    with pytest.raises(ConfigError, match=r"rank 0 of 2.*rank 1 of 3.*whole_state"):
        first.bind_rank(1, 3)
    with pytest.raises(KeyError, match="whole_state"):
        second.load_state_dict(first.state_dict())


def test_an_add_on_hands_everything_on():
    config = FlexMatchConfig(threshold=0.5)
    around = [build_algorithm(config, [DebiasPLConfig()], CLASSES) for _ in range(2)]
    inner = []
    for algorithm in around:
        assert isinstance(algorithm, AddOn)
        algorithm.bind_rank(1, 2)
        assert isinstance(algorithm.base, FlexMatch)
        inner.append(algorithm.base)
    step([made(2, None)[0], inner[0]], [(BLOCK, 1), (BLOCK + 1, 2)], APPLIED)
    assert around[0].rank_statistics()["changes"].tolist() == [0, 1, 1]
    shards = around[0].shards()
    assert shards.keys() == {"labels", "changes"}
    labels = torch.cat([torch.zeros(BLOCK), shards["labels"][0][1]])
    saved = WholeShards({"labels": labels, "changes": shards["changes"][0][1]})
    around[1].load_state_dict(around[0].state_dict(), saved)
    assert inner[1].state["counts"].tolist() == [0, 1, 1]
    assert torch.equal(around[1].shards()["labels"][0][1], shards["labels"][0][1])
