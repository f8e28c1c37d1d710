"""An engine's first step against one process: right ones pass, and wrong ones are refused."""

from __future__ import annotations

import importlib.metadata
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpdist.engines import gradient_check, launch, zero3
from hpdist.engines.gradient_check import (
    LIMIT,
    GradientCheck,
    check_gradients,
    require_right_gradients,
)
from hpdist.engines.replicated import ReplicatedEngine
from hpdist.engines.zero import ZeroEngine
from hpdist.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.recipes import make_model, make_step, train

STAGES = [None, 0, 1, 2, 3]


def plan_of(stage: int | None, precision: Any = "bf16", **settings: Any) -> Any:
    return launch.ExecutionPlan(precision=precision, stage=stage, **settings)


def accelerator_of(plan: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return launch.make_accelerator(plan)


def refused(plan: Any, *, checkpointed: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        require_right_gradients(accelerator_of(plan), plan, checkpointed=checkpointed)
    assert caught.value.everywhere
    return str(caught.value)


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {"errors": {}}
    for stage, precision in [*((stage, "bf16") for stage in STAGES), (2, "fp32")]:
        plan = plan_of(stage, precision)
        accelerator = accelerator_of(plan)
        before = torch.get_rng_state()
        outcome = check_gradients(accelerator, plan, checkpointed=precision == "bf16")
        found["errors"][stage, precision] = outcome.error
        assert torch.equal(torch.get_rng_state(), before)
        assert accelerator._models == accelerator._optimizers == []
    for kind, settings in {"state": {"bf16_state": True}, "cpu": {"offload": "cpu"}}.items():
        plan = plan_of(2, **settings)
        found["errors"][kind, "bf16"] = check_gradients(accelerator_of(plan), plan).error
    with pytest.MonkeyPatch.context() as patch:  # gradients as if DeepSpeed and DDP did not average
        patch.setattr(ZeroEngine, "backward", lambda self, loss: self.deepspeed.backward(loss))
        found["zero2"] = refused(plan_of(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplicatedEngine, "backward", lambda self, loss: loss.backward())
        found["ddp"] = refused(plan_of(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_check, "checkpoint_activations", reentrant)
        found["reentrant"] = refused(plan_of(3, "fp32"), checkpointed=True)
    found["model"] = reentrant_model()
    found["reentrant, not refused"] = unrefused()
    return found


def unrefused() -> float:
    """The error of a gradient under ZeRO-3 that is recomputed in the old way.

    It is infinite where DeepSpeed notices that a bucket has a parameter twice.
    """
    plan = plan_of(3, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_check, "checkpoint_activations", reentrant)
        patch.setattr(zero3, "reentrant_error", lambda outputs: None)
        try:
            return check_gradients(accelerator_of(plan), plan, checkpointed=True).error
        except AssertionError:
            return math.inf


def reentrant(model: Any) -> None:
    """Recompute the second half of the encoder as users did before torch 2.1."""
    block = model.encoder[1]
    block.forward = partial(checkpoint, block.forward, use_reentrant=True)


def reentrant_model() -> dict[int | None, str]:
    """What a step says of a user's model that recomputes in the old way, by stage."""
    found: dict[int | None, str] = {}
    for stage in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.support.recipes.make_model", make_reentrant)
            step = make_step("fixmatch", stage=stage, width=4)
        try:
            train(step, 1)
            found[stage] = ""
        except ConfigError as error:
            found[stage] = str(error)
    return found


def make_reentrant(*arguments: Any) -> nn.Module:
    model: Any = make_model(*arguments)
    layer = model.features[3]
    assert isinstance(layer, nn.Conv2d)
    layer.forward = partial(recomputed, layer.forward)
    return model  # type: ignore[no-any-return]


def recomputed(forward: Any, inputs: Tensor) -> Any:
    return checkpoint(forward, inputs, use_reentrant=True)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    first, second = run_ranks(2, measure)
    assert first == second
    return first


def test_every_engine_takes_the_step_of_one_process(found: dict[str, Any]) -> None:
    assert len(found["errors"]) == len(STAGES) + 3
    for (stage, precision), error in found["errors"].items():
        assert error < (1e-5 if precision == "fp32" else LIMIT / 2), stage


def test_the_limit_is_that_of_rounding() -> None:
    assert GradientCheck("", "", 0.02, 64).passed
    assert not GradientCheck("", "", 0.021, 64).passed
    assert GradientCheck("", "", 0.05, 1024).passed  # a sum of 1,024 numbers in bf16
    assert not GradientCheck("", "", float("nan")).passed


def test_an_engine_that_loses_gradients_is_named(found: dict[str, Any]) -> None:
    version = importlib.metadata.version("deepspeed")
    assert f"ZeRO-2 of DeepSpeed {version}, bf16, 2 ranks over gloo: one step" in found["zero2"]
    assert "another release of deepspeed" in found["zero2"]
    assert "DDP, bf16, 2 ranks over gloo: one step differs by 0.5" in found["ddp"]


def test_deepspeed_still_loses_what_is_recomputed_in_the_old_way(found: dict[str, Any]) -> None:
    """`hpdist.engines.reentrant` can go on the day that this is a right gradient."""
    assert found["reentrant, not refused"] > 0.5


def test_recomputing_in_the_old_way_is_refused_under_zero_3_alone(found: dict[str, Any]) -> None:
    assert "use_reentrant=True" in found["reentrant"]
    assert "use_reentrant=True" in found["model"][3]
    assert 'gradient_checkpointing_kwargs={"use_reentrant": False}' in found["model"][3]
    assert found["model"][2] == ""


def start_twice(folder: Path) -> list[int]:
    """How many checks a run makes at its starts: the first, the next, and with other versions."""
    from tests.support.odd_models import Small, train

    counts, real = [], check_gradients
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    gradient_check.check_gradients = counted
    file = folder / "run" / "gradient_check.json"
    for steps in (1, 2, 3):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(Small, folder, "run", steps)
        counts.append(calls)
        torch.distributed.barrier()
        if steps == 2 and torch.distributed.get_rank() == 0:
            facts = json.loads(file.read_text())
            assert facts["error"] < 1e-5
            facts["engine"]["versions"]["torch"] = "2.0"
            file.write_text(json.dumps(facts))
        torch.distributed.barrier()
    return counts


def test_a_run_remembers_that_its_engine_was_right(tmp_path: Path) -> None:
    assert run_ranks(2, start_twice, tmp_path) == [[1, 1, 2]] * 2
