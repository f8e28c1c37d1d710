"""Overflow on one rank: every rank skips everything, the culprit is named, the scale obeys."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from hpdist.data.samples.digits import write_digits
from hpdist.engines.config import LossScale
from hpdist.errors import PrecisionError
from hpdist.train.data import RunData
from hpdist.train.optim import Schedule, learning_rate
from hpdist.train.step import SemiSupervisedStep, StepOutcome
from tests.support.ranks import run_ranks
from tests.support.recipes import LABELED, UNLABELED, global_batches, make_step, slice_of

STAGES = [None, 0, 1, 2, 3, "fsdp2"]
HALF: dict[str, Any] = {"precision": "fp16", "width": 4}  # a CPU takes long over these


class Injection:
    """Makes the last layer overflow in fp16, really, on one rank and in the rows of one term."""

    def __init__(self, step: SemiSupervisedStep) -> None:
        self.engine = step.engine
        self.rank, self.term = -1, ""
        self.engine.module.classifier.register_forward_hook(self._overflow)

    def _overflow(self, module: Any, arguments: Any, output: Tensor) -> Tensor:
        labeled = LABELED // self.engine.world_size
        unlabeled = UNLABELED // self.engine.world_size
        if self.engine.rank != self.rank or len(output) < labeled + unlabeled:
            return output  # another rank, or the weak pass
        factor = torch.ones(len(output), 1, dtype=output.dtype)
        if self.term == "supervised":
            factor[:labeled] = 6e4
        else:
            factor[labeled : labeled + unlabeled] = 6e4
        return output * factor * factor


def attempt(step: SemiSupervisedStep, number: int) -> StepOutcome:
    engine = step.engine
    return step(*[slice_of(b, engine.rank, engine.world_size) for b in global_batches(number)])


def snapshot(step: SemiSupervisedStep) -> dict[str, Tensor]:
    """Everything that a skipped step must leave alone."""
    engine = step.engine
    kept = {f"master {f.name}": f.values.clone() for f in engine.master_fragments()}
    kept |= {f"teacher {f.name}": f.values.clone() for f in step.teacher.fragments}
    kept |= {f"buffer {n}": b.clone() for n, b in engine.module.named_buffers()}
    kept |= {f"teacher buffer {n}": b.clone() for n, b in step.teacher.buffers.items()}
    kept |= {f"state {n}": t.clone() for n, t in step.algorithm.state_dict().items()}
    for key, fragments in engine.optimizer_fragments().items():
        kept |= {f"{key} {f.name}": f.values.clone() for f in fragments}
    kept["counters"] = torch.tensor([step.applied_steps, step.teacher.updates])
    return kept


PLAN = {0: (1, "supervised"), 3: (0, "unsupervised")}  # attempt -> rank and term that overflow
SCALES = [512, 512, 512, 256, 256, 256, 512, 512]  # after each attempt; 3 would have been a growth


def overflows() -> dict[int | str | None, list[tuple[StepOutcome, list[str]]]]:
    found: dict[int | str | None, list[tuple[StepOutcome, list[str]]]] = {}
    for stage in STAGES:
        scale = LossScale(initial=2.0**10, growth_interval=3)
        step = make_step("freematch", norm="batch", loss_scale=scale, stage=stage, **HALF)
        injection = Injection(step)
        found[stage] = []
        for number in range(len(SCALES)):
            injection.rank, injection.term = PLAN.get(number, (-1, ""))
            before = snapshot(step)
            outcome = attempt(step, number)
            after = snapshot(step)
            changed = [
                k for k, v in after.items() if k not in before or not torch.equal(v, before[k])
            ]
            found[stage].append((outcome, changed))
    return found


@pytest.fixture(scope="module")
def runs() -> list[dict[int | str | None, list[tuple[StepOutcome, list[str]]]]]:
    return run_ranks(2, overflows)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_overflows_and_all_skip_everything(
    runs: list[Any], stage: int | str | None
) -> None:
    for rank in range(2):
        for number, (outcome, changed) in enumerate(runs[rank][stage]):
            assert outcome.applied == (number not in PLAN)
            assert outcome.overflowed == (number in PLAN)
            if number in PLAN:
                assert changed == []
            else:
                kinds = {key.split(" ")[0] for key in changed}
                assert kinds >= {"master", "teacher", "buffer", "state", "counters"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_is_one_number_with_one_history(runs: list[Any], stage: int | str | None) -> None:
    for rank in range(2):
        outcomes = [outcome for outcome, _ in runs[rank][stage]]
        assert [outcome.new_scale for outcome in outcomes] == SCALES
        assert [outcome.old_scale for outcome in outcomes] == [1024, *SCALES[:-1]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_culprit_is_named(runs: list[Any], stage: int | str | None) -> None:
    for number, (rank, term) in PLAN.items():
        sources = [runs[r][stage][number][0].overflow_source for r in range(2)]
        assert sources[0] == sources[1]
        assert (sources[0].rank, sources[0].term) == (rank, term)
        assert (sources[0].module, sources[0].where) == ("classifier", "forward")
        assert runs[0][stage][1][0].overflow_source is None


def weights(step: SemiSupervisedStep) -> Tensor:
    whole = step.engine.layout.gather(step.engine.master_fragments())
    return torch.cat([whole[name] for name in sorted(whole)])


def growths() -> dict[int | str | None, tuple[Tensor, Tensor, list[float]]]:
    found = {}
    for stage in STAGES:
        results = []
        for scale in (LossScale(static=256), LossScale(initial=256, growth_interval=2)):
            step = make_step("fixmatch", stage=stage, loss_scale=scale, **HALF)
            outcomes = [attempt(step, number) for number in range(5)]
            assert all(outcome.applied for outcome in outcomes)
            results.append(weights(step))
        found[stage] = (*results, [outcome.new_scale for outcome in outcomes])
    return found


def test_the_update_is_of_the_right_size_where_the_scale_grows() -> None:
    for stage, (static, dynamic, scales) in run_ranks(2, growths)[0].items():
        assert scales == [256, 512, 512, 1024, 1024], stage
        torch.manual_seed(0)
        moved = static.norm()
        assert (static - dynamic).norm() < 2e-3 * moved, stage


def endless() -> dict[str, str]:
    stories = {}
    for name, stage in (("ddp", None), ("zero2", 2)):
        scale = LossScale(initial=4, minimum=1)
        step = make_step("fixmatch", stage=stage, loss_scale=scale, **HALF)
        injection = Injection(step)
        injection.rank, injection.term = 1, "unsupervised"
        attempt(step, 0)
        attempt(step, 1)
        with pytest.raises(PrecisionError) as caught:
            attempt(step, 2)
        stories[name] = str(caught.value)
    return stories


def test_overflow_without_end_tells_the_story() -> None:
    for story in run_ranks(2, endless)[0].values():
        assert "loss scale is at its minimum" in story
        assert "last loss scales 4, 2, 1" in story
        assert "rank 1, unsupervised term, output of classifier" in story
        assert "optim.lr" in story


def nan_in_forward() -> tuple[list[bool], list[str], str]:
    """NaN weights of the input on one rank, in bf16, where no loss scale looks after it."""
    step = make_step("freematch", norm="batch", precision="bf16")
    first = step.engine.module.features[0]
    poison = False

    def hook(module: Any, arguments: Any, output: Tensor) -> Tensor:
        return output * float("nan") if poison and step.engine.rank == 1 else output

    first.register_forward_hook(hook)
    applied = [attempt(step, 0).applied]
    poison = True
    before = snapshot(step)
    applied.append(attempt(step, 1).applied)
    after = snapshot(step)
    changed = [k for k, v in after.items() if not torch.equal(v, before[k])]
    poison = False
    applied.append(attempt(step, 2).applied)
    poison = True
    for number in range(3, 12):
        assert not attempt(step, number).applied
    with pytest.raises(PrecisionError) as caught:
        attempt(step, 12)
    return applied, changed, str(caught.value)


def test_nan_reaches_nothing_in_any_precision() -> None:
    for applied, changed, story in run_ranks(2, nan_in_forward):
        assert applied == [True, False, True]
        assert changed == []
        assert "10 steps in a row" in story
        assert "features.0" in story


SKIPPED = {2: (1, "supervised"), 3: (0, "unsupervised"), 6: (1, "unsupervised")}
SCHEDULE, PEAK, STEPS = Schedule(name="cosine", warmup_steps=3), 0.05, 6
Moments = list[dict[str, Any]]  # before each attempt, and at the end


def train_with_skips(data: Path, runs: Path) -> dict[str, Moments]:
    """Whole runs, some of whose attempts overflow; what a skip must leave alone, at each moment."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    from hpdist.train.trainer import Trainer

    found = {}
    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    for name, stage in (("ddp", None), ("zero2", 2)):
        AcceleratorState._reset_state(reset_partial_state=True)  # of the run before
        trainer = Trainer(
            {"name": "cnn", "width": 4},
            {"name": "freematch", "momentum": 0.9},
            labeled=files | {"labels_per_class": 4},
            unlabeled=files | {"streaming": True, "audit": True},
            batch={"labeled": LABELED, "unlabeled": UNLABELED},
            views={"weak": {"flip": False}},
            precision="fp16",
            loss_scale={"initial": 1024.0, "growth_interval": 100},
            zero={"stage": stage},
            optim={"name": "sgd", "lr": PEAK},
            schedule=SCHEDULE.model_dump(),
            steps=STEPS,
            run={"dir": str(runs), "name": name},
            log={"every": 1},
            tracker={"name": "none"},
        )
        found[name] = watched(trainer)
    return found


def watched(trainer: Any) -> Moments:
    """Train, and see to it that the attempts of `SKIPPED` overflow."""
    step = trainer.step
    injection, moments = Injection(step), []
    real = RunData.next

    def note() -> None:
        moments.append(
            {
                "attempts": step.attempts,
                "applied": step.applied_steps,
                "teacher updates": step.teacher.updates,
                "rate": step.engine.optimizer.param_groups[0]["lr"],
                "thresholds": {k: v.tolist() for k, v in step.algorithm.state_dict().items()},
            }
        )

    def following(self: RunData) -> Any:
        note()
        injection.rank, injection.term = SKIPPED.get(step.attempts, (-1, ""))
        return real(self)

    RunData.next = following  # type: ignore[method-assign]
    try:
        trainer.fit()
    finally:
        RunData.next = real  # type: ignore[method-assign]
    note()
    return moments


def test_the_schedule_and_every_counter_of_a_run_stand_still(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    attempts = STEPS + len(SKIPPED)
    applied = [number for number in range(attempts) if number not in SKIPPED]
    done = [sum(number < attempt for number in applied) for attempt in range(attempts + 1)]
    rates = [learning_rate(SCHEDULE, PEAK, number, STEPS) for number in range(STEPS)]
    for moments in run_ranks(2, train_with_skips, data, tmp_path)[0].values():
        assert [moment["attempts"] for moment in moments] == list(range(attempts + 1))
        assert [moment["applied"] for moment in moments] == done
        assert [moment["teacher updates"] for moment in moments] == done
        used = [moment["rate"] for moment in moments[1:]]
        assert used == pytest.approx([rates[number] for number in done[:-1]])
        for number, (before, after) in enumerate(pairwise(moments)):
            assert (before["thresholds"] == after["thresholds"]) == (number in SKIPPED)
    for name in ("ddp", "zero2"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["attempt"] for record in records] == [number + 1 for number in applied]
        assert [record["lr"] for record in records] == pytest.approx(rates)
        assert [record["overflows"] for record in records] == [
            sum(number < attempt for number in SKIPPED) for attempt in applied
        ]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["steps"], summary["skipped_steps"]) == (STEPS, len(SKIPPED))
