"""Traps of bare Accelerate and DeepSpeed that hpdist steps around.

Each test shows that a trap is still there. One that fails means that upstream has mended it, and
that the workaround it names can go.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler

from tests.support.ranks import free_port, run_ranks

GRADIENT = 0.0625  # exact in fp16, whatever it is scaled by here
GROWING = {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
STATIC = {"loss_scale": 256}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a trap of ranks without a GPU")


def bare_accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **options)


def updates(
    stage: int,
    fp16: dict[str, float],
    steps: int,
    backward: Callable[[Any, Tensor], None] = lambda engine, inputs: engine.backward(
        engine(inputs).sum()
    ),
) -> list[float]:
    """How far each step of SGD, lr 1, moves a weight whose gradient is GRADIENT in all of them."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param

    type(get_accelerator()).is_fp16_supported = lambda self: True
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": True, **fp16},
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    accelerator = bare_accelerator(mixed_precision="fp16", deepspeed_plugin=plugin)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weight = engine.module.weight

    def value() -> float:
        master = safe_get_full_fp32_param(weight)  # None in stage 0
        return float((weight if master is None else master).detach())

    moved, before = [], value()
    for _ in range(steps):
        inputs = torch.full((1, 1), GRADIENT, dtype=torch.float16, device=accelerator.device)
        backward(engine, inputs)
        engine.step()
        moved.append(before - value())
        before = value()
    return moved


def two_losses(engine: Any, inputs: Tensor) -> None:
    """A loss in two halves, each with its forward and backward, as two-term recipes are written."""
    engine.backward(engine(inputs / 2).sum())
    engine.backward(engine(inputs / 2).sum())


def measure() -> dict[str, Any]:
    """All traps in one process group, those without DeepSpeed first."""
    # With another ninja than hpdist's, DeepSpeed would compile its operator anew, and hpdist again.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found: dict[str, Any] = {}
    found["joined"] = bare_accelerator().distributed_type
    found["joined, cpu"] = bare_accelerator(cpu=True).distributed_type
    accelerator = bare_accelerator(cpu=True, mixed_precision="fp16")
    seen: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    accelerator.prepare(model)(torch.ones(2, 4))
    found["computes in"], found["scaler"] = seen, accelerator.scaler is not None
    for stage in (1, 2, 3):
        found[f"growing scale, stage {stage}"] = updates(stage, GROWING, 6)
        found[f"static scale, stage {stage}"] = updates(stage, STATIC, 2)
    found["static scale, stage 0"] = updates(0, STATIC, 2)
    for stage in (1, 2):
        found[f"two backwards, stage {stage}"] = updates(stage, STATIC, 2, two_losses)
    return found


@pytest.fixture(scope="module")
def traps() -> dict[str, Any]:
    first, second = run_ranks(2, measure)
    assert first == second
    return first


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_halves_the_update_where_the_scale_grows(
    traps: dict[str, Any], stage: int
) -> None:
    """ZeroEngine._take_over_scale; https://github.com/deepspeedai/DeepSpeed/pull/8588."""
    g = GRADIENT
    assert traps[f"static scale, stage {stage}"] == [g, g]
    assert traps[f"growing scale, stage {stage}"] == [g, g, g / 2, g, g / 2, g]


def test_deepspeed_stage_0_unscales_a_loss_that_it_never_scaled(traps: dict[str, Any]) -> None:
    """UnshardedEngine.backward; https://github.com/deepspeedai/DeepSpeed/pull/8393."""
    assert traps["static scale, stage 0"] == [GRADIENT / 256, GRADIENT / 256]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_forgets_the_first_of_two_backwards(traps: dict[str, Any], stage: int) -> None:
    """Why a step sums its terms; a loss in two halves moves the weight by one of them."""
    assert traps[f"two backwards, stage {stage}"] == [GRADIENT / 2, GRADIENT / 2]


@on_cpu
def test_accelerate_leaves_cpu_ranks_apart(traps: dict[str, Any]) -> None:
    """gloo alone joins the group, not the training (see `ranks_train_separately`)."""
    assert traps["joined"] == DistributedType.NO
    assert traps["joined, cpu"] == DistributedType.MULTI_CPU


@on_cpu
def test_accelerate_takes_fp16_on_a_cpu_for_fp32(traps: dict[str, Any]) -> None:
    """ReplicatedEngine's own autocast and loss scaler."""
    assert traps["computes in"] == [torch.float32]
    assert not traps["scaler"]


def test_deepspeed_makes_fp32_on_nvme_bf16_where_there_is_no_fp16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """make_plugin's lifted check; https://github.com/deepspeedai/DeepSpeed/pull/8428."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    kind = type(get_accelerator())
    found = {}
    for supported in (True, False):
        monkeypatch.setattr(kind, "is_fp16_supported", lambda self, answer=supported: answer)
        holder = SimpleNamespace()
        Init._set_dtype(holder, None, torch.float32)
        found[supported] = holder.dtype
    assert found == {True: torch.float32, False: torch.bfloat16}


def test_a_static_rendezvous_still_keeps_one_store_for_all_attempts() -> None:
    parameters = RendezvousParameters(
        "static", f"127.0.0.1:{free_port()}", "none", 1, 1, rank=0, timeout=30
    )
    handler = create_rdzv_handler(parameters)
    first = handler.next_rendezvous()
    first.store.set("address", "of a rank that died")
    second = handler.next_rendezvous()  # as after a restart
    assert second.store.check(["address"]), "mended upstream: _join_after_restart can go"
