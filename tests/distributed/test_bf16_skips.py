"""A gradient that is not finite on one rank, in bf16: every engine skips the step and says so.

DeepSpeed itself skips such a step without a word (https://github.com/deepspeedai/DeepSpeed/issues/8415).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import Tensor

from hpdist.data.samples.digits import write_digits
from hpdist.train.step import SemiSupervisedStep
from tests.distributed.test_overflow import attempt, snapshot
from tests.support.ranks import run_ranks
from tests.support.recipes import LABELED, UNLABELED, make_step
from tests.support.sampling import selected

STAGES = [
    *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1)),
    *(None, 2, 3),
]


class Poison:
    """Makes the gradient of a layer infinite on rank 1, while every loss stays finite."""

    def __init__(self, step: SemiSupervisedStep) -> None:
        self.active = False
        self.engine = step.engine
        self.engine.module.features[0].register_forward_hook(self._hook)

    def _hook(self, module: Any, arguments: Any, output: Tensor) -> Tensor:
        if self.active and self.engine.rank == 1 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))
        return output


def skips(stages: list[int | None]) -> dict[int | None, Any]:
    found: dict[int | None, Any] = {}
    for stage in stages:
        step = make_step("freematch", norm="batch", precision="bf16", stage=stage, width=4)
        poison = Poison(step)
        outcomes, changed = [], []
        for number in range(3):
            poison.active = number == 1
            before = snapshot(step)
            outcomes.append(attempt(step, number))
            after = snapshot(step)
            changed.append([k for k, v in after.items() if not v.equal(before.get(k, v * 0 + 7))])
        found[stage] = (outcomes, changed)
    return found


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> list[Any]:
    return run_ranks(2, skips, [stage for (stage,) in selected(request, "stage")])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_skip_everything_and_name_the_source(runs: list[Any], stage: int | None) -> None:
    for found in runs:
        outcomes, changed = found[stage]
        assert [outcome.applied for outcome in outcomes] == [True, False, True]
        assert [outcome.overflowed for outcome in outcomes] == [False, True, False]
        assert changed[1] == []
        assert changed[0]
        assert changed[2]
        source = outcomes[1].overflow_source
        assert source is not None
        assert (source.rank, source.where) == (1, "backward")
        assert outcomes[1].overflow == str(source)  # there is no loss scale to speak of


def train_in_bf16(data: Path, runs: Path) -> None:
    from hpdist.train.trainer import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    trainer = Trainer(
        {"name": "cnn", "width": 4},
        "fixmatch",
        labeled=files | {"labels_per_class": 4},
        unlabeled=files | {"streaming": True},
        batch={"labeled": LABELED, "unlabeled": UNLABELED},
        precision="bf16",
        zero={"stage": 2},
        steps=4,
        run={"dir": str(runs), "name": "run"},
        log={"every": 1},
        tracker={"name": "none"},
    )
    poison = Poison(trainer.step)
    real = trainer.data.next

    def following() -> Any:
        poison.active = trainer.step.attempts in (1, 2)
        return real()

    trainer.data.next = following
    trainer.fit()


def test_a_run_counts_them(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run_ranks(2, train_in_bf16, data, tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["overflows"] for record in records] == [0, 2, 2, 2]
    assert [record["attempt"] for record in records] == [1, 4, 5, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_steps"]) == (4, 2)
