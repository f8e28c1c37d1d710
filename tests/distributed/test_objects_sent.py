"""What the ranks of a run send one another as objects, from its start to its end: it is counted."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hpdist.train.trainer import Trainer
from tests.distributed.test_lora import forget_launch
from tests.support.parquet_files import write_numbers
from tests.support.ranks import run_ranks
from tests.support.small_runs import held_out, trainer

Sent = dict[str, list[int]]


def made(folder: Path, steps: int) -> Trainer:
    forget_launch()
    model = {"name": "mlp", "hidden": [8]}
    return trainer(folder, steps, model=model, test=held_out(*range(8)))


def sent(folder: Path, ends: list[int]) -> Sent:
    """The bytes of every object that this rank gives, by the collective, in runs to these steps."""
    found: Sent = defaultdict(list)
    places = {"all_gather_object": 1, "gather_object": 0, "broadcast_object_list": 0}

    def counting(name: str, place: int) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            given = args[place] if name != "broadcast_object_list" or dist.get_rank() == 0 else None
            found[name].append(len(pickle.dumps(given)))
            return original(*args, **options)

        return call

    for name, place in places.items():
        setattr(dist, name, counting(name, place))
    for steps in ends:
        made(folder, steps).fit()
    return dict(found)


def check(folder: Path, ranks: int, ends: list[int]) -> None:
    write_numbers(folder / "data", [[30]])
    runs = len(ends)
    for rank, found in enumerate(run_ranks(ranks, sent, folder, ends)):
        # Where whole weights are put together, each rank's fragments.
        assert len(found["all_gather_object"]) == runs
        assert sum(found["all_gather_object"]) < 250 * runs
        # Hosts and devices twice, and rows for the report.
        assert len(found["gather_object"]) == 3 * runs
        assert sum(found["gather_object"]) < 2000 * runs
        if rank == 0:  # what all are told, none of it by ranks
            assert sum(found["broadcast_object_list"]) < 6000 * runs


def test_what_every_rank_has_of_every_other_is_little(tmp_path: Path) -> None:
    check(tmp_path, 2, [2])


@pytest.mark.slow
def test_it_is_as_little_on_more_ranks_and_in_a_resume(tmp_path: Path) -> None:
    check(tmp_path, 4, [2, 4])
