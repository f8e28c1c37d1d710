"""`accelerator.save_state` and `load_state` in a loop of one's own: nothing of a step is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hpdist
from hpdist.algorithms.flexmatch import FlexMatch
from hpdist.engines.config import LossScale
from hpdist.errors import CheckpointError
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import digits, global_batches, make_step, slice_of, train

Case = tuple[str, dict[str, Any]]
DDP: Case = ("ddp", {"precision": "bf16"})
ZERO2: Case = ("zero2", {"precision": "fp16", "stage": 2, "loss_scale": "grows"})
MORE: list[Case] = [
    ("plain fp16", {"precision": "fp16", "loss_scale": "grows"}),
    ("zero0", {"precision": "fp16", "stage": 0, "loss_scale": "grows"}),
    ("zero1", {"precision": "bf16", "stage": 1, "optimizer": "adamw"}),
    ("zero3", {"precision": "fp16", "stage": 3, "optimizer": "adamw", "loss_scale": "grows"}),
]


def make(options: dict[str, Any], **more: Any) -> SemiSupervisedStep:
    options = dict(options)
    if "loss_scale" in options:
        options["loss_scale"] = LossScale(initial=2.0**10, growth_interval=2)
    algorithm = FlexMatch(10, threshold=0.15)
    algorithm.rows = len(digits()[0])
    return make_step(algorithm, norm="batch", decay=0.9, **options, **more)


def remembered(step: SemiSupervisedStep) -> dict[str, Any]:
    assert step.teacher is not None
    engine = step.engine
    found: dict[str, Any] = {f"teacher/{k}": v.clone() for k, v in step.teacher.whole().items()}
    table = {name: value.clone() for name, value in hpdist.whole_state(step.algorithm).items()}
    if "changes" in table:  # of the last step, on several ranks; a load adds them up
        changes = table.pop("changes").view(engine.world_size, -1).sum(0)
        table["counts"] += changes[:-1]
        table["seen"] += changes[-1]
    found |= {f"table/{name}": value for name, value in table.items()}
    weights = engine.layout.gather(engine.master_fragments())
    found |= {f"weights/{k}": v.clone() for k, v in weights.items()}
    scalars = (step.applied_steps, step.attempts, step.teacher.updates, engine.loss_scale)
    return found | {"counters": torch.tensor(scalars)}


def steps_from(step: SemiSupervisedStep, first: int, last: int) -> list[float]:
    losses = []
    for number in range(first, last):
        own = [
            slice_of(batch, step.engine.rank, step.engine.world_size)
            for batch in global_batches(number)
        ]
        losses.append(step(*own, measure=True).metrics["loss"])
    return losses


def uninterrupted(folder: str, cases: list[Case]) -> list[Any]:
    found = []
    for name, options in cases:
        step = make(options)
        steps_from(step, 0, 1)
        step.engine.accelerator.save_state(f"{folder}/{name}")  # the next one takes its place
        steps_from(step, 1, 3)
        step.engine.accelerator.save_state(f"{folder}/{name}")
        there = remembered(step)
        losses = steps_from(step, 3, 6)
        found.append((there, losses, remembered(step)))
    return found


def resumed(folder: str, cases: list[Case]) -> list[Any]:
    found = []
    for name, options in cases:
        step = make(options)
        step.engine.accelerator.load_state(f"{folder}/{name}")
        there = remembered(step)
        losses = steps_from(step, 3, 6)
        found.append((there, losses, remembered(step)))
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"differs: {different}"


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> None:
    monkeypatch.setenv("HPDIST_ALLOW_CPU_FP16", "1")
    whole = run_ranks(2, uninterrupted, str(tmp_path), cases)
    again = run_ranks(2, resumed, str(tmp_path), cases)
    for rank in range(2):
        for case, one, other in zip(cases, whole[rank], again[rank], strict=True):
            assert_same(one[0], other[0])
            assert one[1] == other[1], case[0]
            assert_same(one[2], other[2])
    for name, _ in cases:
        assert len(list((tmp_path / name / "hpdist").iterdir())) == 1, "the last one alone is kept"


def test_a_loop_of_ones_own_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path, monkeypatch, [DDP, ZERO2])
    run_ranks(4, on_other_ranks, str(tmp_path / "ddp"))


def on_other_ranks(folder: str) -> None:
    step = make(DDP[1])
    step.engine.accelerator.load_state(folder)
    assert step.applied_steps == 3
    labels = hpdist.whole_state(step.algorithm)["labels"]
    assert (labels >= 0).any(), "FlexMatch's labels are dealt out among four now"
    steps_from(step, 3, 4)


@pytest.mark.slow
def test_so_it_does_under_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, MORE)


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    step = make({})
    accelerator = step.engine.accelerator
    train(step, 1)
    accelerator.save_state(str(tmp_path))

    other = make_step("fixmatch", norm="batch", decay=0.9)
    with pytest.raises(CheckpointError, match=r"another algorithm: .*FlexMatch there, .*FixMatch"):
        other.engine.accelerator.load_state(str(tmp_path))
    without = make_step(FlexMatch(10), norm="batch", decay=None)
    with pytest.raises(CheckpointError, match="with a teacher, and this is one without"):
        without.engine.accelerator.load_state(str(tmp_path))
    [part] = (tmp_path / "hpdist").rglob("rank-00000.safetensors")
    *first, last = part.read_bytes()
    part.write_bytes(bytes([*first, last ^ 1]))
    step = make({})
    accelerator = step.engine.accelerator
    with pytest.raises(CheckpointError, match=r"load_state: checkpoint step-00000001 .* damaged"):
        accelerator.load_state(str(tmp_path))
    shutil.rmtree(tmp_path / "hpdist")
    with pytest.raises(CheckpointError, match=r"hpdist' .*teacher and algorithm need it"):
        accelerator.load_state(str(tmp_path))


def saved_under(folder: str, cases: list[Case]) -> None:
    for name, options in cases:
        step = make(options)
        steps_from(step, 0, 1)
        step.engine.accelerator.save_state(f"{folder}/{name}")


def refusals(folder: str, cases: list[Case]) -> list[tuple[str, int, bool]]:
    """What each load says, and whether the step is as it was made."""
    found = []
    for name, options in cases:
        step = make(options)
        before = remembered(step)
        with pytest.raises(CheckpointError) as caught:
            step.engine.accelerator.load_state(f"{folder}/{name}")
        after = remembered(step)
        same = all(torch.equal(value, after[key]) for key, value in before.items())
        found.append((str(caught.value), step.applied_steps, same))
    return found


BY_STAGE: list[Case] = [
    ("zero1", {"precision": "bf16", "stage": 1}),
    ("zero2", {"precision": "bf16", "stage": 2}),
    ("zero3", {"precision": "bf16", "stage": 3}),
]


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_is_refused_under_zero_before_anything_changes(
    tmp_path: Path, ranks: int
) -> None:
    run_ranks(2, saved_under, str(tmp_path), BY_STAGE)
    for found in run_ranks(ranks, refusals, str(tmp_path), BY_STAGE):
        for number, (said, steps, same) in enumerate(found, start=1):
            assert f"under ZeRO-{number} in bfloat16 on 2 processes" in said
            assert f"this is under ZeRO-{number} in bfloat16 on {ranks} process" in said
            assert "hpdist.Trainer" in said
            assert (steps, same) == (0, True)


def elsewhere(folder: str) -> list[str]:
    """What loads say of a state that another engine has saved, or a part of which is gone."""
    zero2, zero1 = {"precision": "bf16", "stage": 2}, {"precision": "bf16", "stage": 1}
    ddp = {"precision": "bf16"}
    cases: list[Case] = [("zero2", zero2), ("ddp", ddp), ("lost", zero2), ("part", zero2)]
    cases.append(("torn", zero2))
    saved_under(folder, cases)
    shutil.rmtree(f"{folder}/lost/pytorch_model")
    [shard] = Path(folder, "part").rglob("*optim_states.pt")
    shard.unlink()
    step = make(zero2)
    steps_from(step, 0, 2)
    step.engine.deepspeed.save_checkpoint(f"{folder}/torn", "pytorch_model")
    tried: list[Case] = [
        ("zero2", zero1),
        ("zero2", {"precision": "fp32", "stage": 2}),
        ("zero2", ddp),
        ("ddp", zero2),
        ("lost", zero2),
        ("part", zero2),
    ]
    said = [each for each, _, same in refusals(folder, tried) if same]
    step = make(zero2)  # held: a step that nobody holds is not loaded
    with pytest.raises(CheckpointError) as caught:
        step.engine.accelerator.load_state(f"{folder}/torn")
    return [*said, str(caught.value)]


def test_what_deepspeed_would_lose_without_a_word_is_refused(tmp_path: Path) -> None:
    [[stage, dtype, to_ddp, to_zero, lost, part, torn]] = run_ranks(1, elsewhere, str(tmp_path))
    assert "ZeRO-2 in bfloat16 on 1 process, and this is under ZeRO-1 in bfloat16" in stage
    assert "and this is under ZeRO-2 in float32" in dtype
    assert "ZeRO-2 in bfloat16 on 1 process, and this is without DeepSpeed" in to_ddp
    assert "was saved without DeepSpeed, and this is under ZeRO-2" in to_zero
    assert "finds no *model_states.pt from DeepSpeed in" in lost
    assert "rank 0 finds no *zero_pp_rank_0_mp_rank_*optim_states.pt" in part
    assert "after 1 steps, and the weights beside it after 2" in torn
    assert "save to a new one each time" in torn


def test_a_step_that_is_made_after_the_load_says_that_it_has_missed_it(tmp_path: Path) -> None:
    step = make({})
    train(step, 1)
    engine = step.engine
    with pytest.warns(UserWarning, match="make it before accelerator.load_state"):
        SemiSupervisedStep(
            engine.accelerator, engine.model, engine.optimizer, FlexMatch(10), step.views
        )


def test_evaluation_lends_the_teacher_and_gives_it_back() -> None:
    step = make({}, lr=0.1)
    train(step, 3)
    assert step.teacher is not None
    module, images = step.engine.module, digits()[0][:50]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with step.evaluating(teacher=False) as predict:
        assert not module.training
        student = predict(images)
    with step.evaluating() as predict:
        teacher = predict(images)
        for name, value in step.teacher.whole().items():
            assert torch.equal(module.state_dict()[name], value)
    assert module.training
    assert student.shape == teacher.shape == (50, 10)
    assert student.dtype == teacher.dtype == torch.float32
    assert not student.requires_grad
    assert not torch.equal(student, teacher)
    for name, value in module.state_dict().items():
        assert torch.equal(before[name], value)
