"""FSDP2 on real ranks: DDP's numbers bit for bit in fp32, every element once, honest refusals."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import hpdist
from hpdist.engines.config import LossScale, Shard
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.fsdp2 import ShardedEngine
from hpdist.engines.launch import make_accelerator
from hpdist.engines.prepare import make_engine, prepare
from hpdist.errors import ConfigError, DistributedError
from tests.support.odd_models import ByRank, Complex, Odd, Small, differing
from tests.support.odd_models import train as train_odd
from tests.support.ranks import run_ranks
from tests.support.recipes import make_step, train

STEPS = 4


def curves(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses, and the whole teacher at the end."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    found = []
    for algorithm, options in cases:
        scale = LossScale(initial=2.0**10)
        step = make_step(algorithm, norm="batch", loss_scale=scale, **options)
        losses = [record["loss"] for record in train(step, STEPS)]
        assert step.teacher is not None
        found.append((losses, {k: v.clone() for k, v in step.teacher.whole().items()}))
    return found


def test_two_ranks_do_in_fp32_what_ddp_does_bit_for_bit() -> None:
    cases = [
        (algorithm, {"stage": stage, "optimizer": "adamw"})
        for algorithm in ("mean_teacher", "fixmatch")
        for stage in (None, "fsdp2", "fsdp2 whole")
    ]
    found = run_ranks(2, curves, cases)
    assert found[0][0][0] == found[1][0][0]
    for first in (0, 3):
        losses, teacher = found[0][first]
        assert len(set(losses)) == STEPS
        for other_losses, other in found[0][first + 1 : first + 3]:
            assert other_losses == losses
            assert other.keys() == teacher.keys()
            assert all(torch.equal(other[name], teacher[name]) for name in teacher)


def interrupted(stage: str | None) -> tuple[list[float], list[float]]:
    """Losses of a run in which an evaluation fails inside the model, and of one without."""
    curves = []
    for fails in (True, False):
        step = make_step("fixmatch", stage=stage, norm="batch")
        losses = [record["loss"] for record in train(step, 2)]
        if fails:
            handle = step.engine.module.get_submodule("features.2").register_forward_hook(_fail)
            with pytest.raises(OSError, match="out of luck"), step.evaluating() as predict:
                predict(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
            handle.remove()
        curves.append(losses + [record["loss"] for record in train(step, 2)])
    return curves[0], curves[1]


def _fail(module: nn.Module, arguments: Any, output: Tensor) -> None:
    raise OSError("out of luck")


@pytest.mark.parametrize("stage", [pytest.param("fsdp2", marks=pytest.mark.slow), "fsdp2 whole"])
def test_a_failed_evaluation_leaves_no_trace(stage: str) -> None:
    for failed, expected in run_ranks(2, interrupted, stage):
        assert failed == expected


def held() -> list[tuple[str, int, int]]:
    """The elements that this rank holds, of weights with fewer rows than ranks too."""
    engine = make_engine_of(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    rank = torch.distributed.get_rank()
    for fragment in engine.master_fragments():
        size = engine.parameter_shapes()[fragment.name].numel()
        whole = torch.arange(size, dtype=torch.float32)
        fragment.values.copy_(whole[fragment.start : fragment.start + len(fragment.values)])
    for name, shape in engine.parameter_shapes().items():
        shard: Any = engine.module.get_parameter(name)
        whole = shard.full_tensor()
        assert torch.equal(whole, torch.arange(shape.numel()).float().view(shape)), (rank, name)
    return [(f.name, f.start, len(f.values)) for f in engine.master_fragments()]


def make_engine_of(model: nn.Module, **shard: Any) -> ShardedEngine:
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = ExecutionPlan(shard=Shard(engine="fsdp2", min_parameters=0, **shard))
    accelerator = make_accelerator(plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_engine(accelerator, *prepare(accelerator, model, optimizer, plan))
    assert isinstance(engine, ShardedEngine)
    return engine


def test_four_ranks_hold_every_element_once() -> None:
    spans = [span for rank in run_ranks(4, held) for span in rank]
    sizes = {"0.weight": 35, "0.bias": 7, "2.weight": 21, "2.bias": 3}
    for name, size in sizes.items():
        own = sorted((start, length) for each, start, length in spans if each == name)
        ends = [0, *(start + length for start, length in own)]
        assert [start for start, _ in own] == ends[:-1]
        assert ends[-1] == size
    assert [span for span in spans if span[0] == "2.bias"] == [("2.bias", n, 1) for n in range(3)]


class OddVectors(Odd):
    """An odd model without parameters of no dimensions, which FSDP2 cannot shard."""

    def __init__(self) -> None:
        super().__init__()
        self.dead_scalar = nn.Parameter(torch.tensor([3.0]))
        self.temperature = nn.Parameter(torch.tensor([1.0]))


class Dead(Small):
    """A layer that no forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Linear(8, 8)


FSDP2: dict[str, Any] = {"shard": {"engine": "fsdp2", "min_parameters": 0}}


def odd(folder: Path) -> dict[str, Any]:
    """Models whose ranks reach different weights, or none; resumed; and those that are refused."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    warnings.simplefilter("ignore")
    adamw = {**FSDP2, "optim": {"name": "adamw", "lr": 0.01}, "precision": "fp16"}
    train_odd(OddVectors, folder, "whole", 4, **adamw)
    train_odd(OddVectors, folder, "halves", 2, **adamw)
    train_odd(OddVectors, folder, "halves", 4, **adamw)
    found: dict[str, Any] = {"differing": differing(folder, "whole", "halves", 4)}
    micro = {"labeled": 4, "unlabeled": 8, "micro": 3}
    whole = {"shard": FSDP2["shard"] | {"reshard_after_forward": False}}
    one_unit = {"shard": {"engine": "fsdp2", "units": []}}  # all ranks must run the same units
    for name, settings in (("ddp", {}), ("fsdp2", one_unit)):
        trainer = train_odd(ByRank, folder, f"by-rank-{name}", 4, **settings)
        found[name] = {k: v.clone() for k, v in trainer.teacher_model().named_parameters()}
    train_odd(Dead, folder, "dead", 2, batch=micro, **whole)  # a unit that no forward runs
    for kind in (Complex, Odd):
        with pytest.raises(ConfigError) as caught:
            train_odd(kind, folder, f"{kind.__name__}-fsdp2", 1, **FSDP2)
        found[kind.__name__] = str(caught.value)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        train_odd(Dead, folder, "unreached", 1, **FSDP2)
    found["unreached"] = [str(each.message) for each in caught_warnings]
    return found


@pytest.mark.slow
def test_odd_parameters_train_and_resume_or_are_refused_by_name(tmp_path: Path) -> None:
    one, other = run_ranks(2, odd, tmp_path)
    assert one["differing"] == other["differing"] == []
    for name, values in one["ddp"].items():
        torch.testing.assert_close(one["fsdp2"][name], values, rtol=1e-4, atol=1e-5)
    assert "model: phase cannot be sharded by shard.engine: fsdp2, because it is" in one["Complex"]
    assert "has no dimensions; give it the shape [1]" in one["Odd"]
    (told,) = [line for line in one["unreached"] if "does not reach" in line]
    assert "changes only by weight decay under FSDP2" in told


def refusals(folder: Path) -> None:
    step = make_step("fixmatch", stage="fsdp2")
    with pytest.raises(ConfigError, match=r"accelerator\.save_state and load_state do not know"):
        step.engine.accelerator.save_state(str(folder))
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.distributed.fsdp.fully_shard(model)
    with pytest.raises(DistributedError, match=r"but not by hpdist\.fully_shard"):
        make_engine(accelerator, model, optimizer)
    with pytest.raises(ConfigError, match="parameters of the optimizer are not the model's"):
        hpdist.fully_shard(accelerator, nn.Linear(3, 3), optimizer)
    compiled: Any = torch.compile(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="the model is compiled or wrapped already"):
        hpdist.fully_shard(accelerator, compiled, optimizer)
    with pytest.raises(ConfigError, match=r"optim.l1: ZeRO-3 and FSDP2 shard the weights"):
        make_step("fixmatch", stage="fsdp2", l1=0.1)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refusals, tmp_path)


def test_one_process_that_nothing_launched() -> None:
    (found,) = run_ranks(1, alone)
    losses, expected = found
    assert losses == expected


def alone() -> tuple[list[float], list[float]]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    expected = [record["loss"] for record in train(make_step("fixmatch"), 2)]
    step = make_step("fixmatch", stage="fsdp2")
    return [record["loss"] for record in train(step, 2)], expected
