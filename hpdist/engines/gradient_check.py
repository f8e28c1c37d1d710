"""One step of a small model on a run's engine, against one process in fp32, before training.

Releases of DeepSpeed have lost half of a gradient, or divided it, without a word (reports 7718 and
7837): losses still fall, so nothing else would show it. What they had in common is a module that a
step uses twice, several micro-batches, or half precision, so the step here has all three.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.distributed.collectives import FusedSum, raise_together, world_size
from hpdist.engines.base import Engine
from hpdist.engines.config import LossScale
from hpdist.engines.deepspeed_sections import plain_section
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.prepare import make_engine, prepare
from hpdist.errors import ConfigError
from hpdist.messages.progress import working
from hpdist.models.activation_checkpointing import checkpoint_activations

LIMIT = 0.02
"""The largest relative error of a parameter's update: rounding makes 0.006 in bf16, 0.001 in fp16.

Beyond 64 ranks it grows with the square root of their number, as does the rounding of sums of
gradients that DeepSpeed exchanges in half precision.
"""
MICRO_BATCHES = 2
_ROWS = 4  # of a micro-batch, on each rank
_WIDTH = 16
_CLASSES = 4
_FEW_RANKS = 64  # ranks up to which rounding stays within the limit
_LR = 256.0  # so that the update, not the weight, decides how bf16 masters are rounded
_SCALE = LossScale(static=1024.0)


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of one step on an engine."""

    engine: str
    """The engine in words, such as `ZeRO-2 of DeepSpeed 0.19.8, bf16, 2 ranks over gloo`."""
    package: str
    """The package that computes the gradients: torch or deepspeed."""
    error: float
    """The largest relative error of a parameter's update, against one process in fp32."""
    world_size: int = 1

    @property
    def limit(self) -> float:
        """The largest error that is rounding."""
        return LIMIT * math.sqrt(max(self.world_size / _FEW_RANKS, 1))

    @property
    def passed(self) -> bool:
        """Whether the error is rounding."""
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        text = f"{self.engine}: one step differs by {self.error:.2g} from one process in fp32"
        if self.passed:
            return text
        return (
            f"{text}, where rounding makes at most {self.limit:.2g}, so this engine computes wrong "
            f"gradients here; install another release of {self.package}, or choose another "
            "zero.stage, shard.engine or precision"
        )


class _TwiceUsed(nn.Module):
    """A model whose encoder sees two views of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()),
            nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()),
        )
        self.head = nn.Linear(_WIDTH, _CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map two views [rows, 2, width] to logits [rows, classes]."""
        first, second = inputs.unbind(dim=1)
        return cast(Tensor, self.head(self.encoder(first) * self.encoder(second)))


def engine_facts(plan: ExecutionPlan) -> dict[str, Any]:
    """What the outcome of a check depends on: a run repeats it where one of these differs."""
    packages = ["torch", "accelerate", *([] if plan.stage is None else ["deepspeed"])]
    return {
        "precision": plan.precision,
        "stage": plan.stage,
        "shard_engine": plan.shard.engine,
        "offload": plan.offloads_to,
        "bf16_state": plan.bf16_state,
        "ranks": world_size(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def needs_check(plan: ExecutionPlan) -> bool:
    """Whether a run's engine is another than one plain process."""
    return plan.is_sharded or world_size() > 1


def require_right_gradients(
    accelerator: Accelerator, plan: ExecutionPlan, *, checkpointed: bool = False
) -> GradientCheck:
    """Check the gradients of a run's engine, and return the outcome.

    Args:
        accelerator: The run's; nothing of the check stays in it.
        plan: How the run computes and shards.
        checkpointed: Whether the run recomputes activations in the backward pass.

    Raises ConfigError on all ranks if the update is wrong. Collective: every rank must call.
    """
    found = check_gradients(accelerator, plan, checkpointed=checkpointed)
    raise_together(None if found.passed else ConfigError(str(found)))
    return found


@working("checking one step's gradients")
def check_gradients(
    accelerator: Accelerator, plan: ExecutionPlan, *, checkpointed: bool = False
) -> GradientCheck:
    """Do one step on the engine and in this process, and compare. Collective."""
    model, inputs, targets = _example(accelerator.device)
    reference = _reference_update(copy.deepcopy(model), inputs, targets)
    if checkpointed:
        checkpoint_activations(model)
    engine = _make_engine(accelerator, plan, model)
    update = _engine_update(engine, inputs, targets)
    if plan.stage is not None:
        cast(Any, engine).deepspeed.destroy()
    return GradientCheck(
        _described(plan, accelerator.device),
        "torch" if plan.stage is None else "deepspeed",
        _relative_error(update, reference),
        world_size(),
    )


def _example(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and the rows of all ranks: [micro-batches, ranks, rows, *]; equal on all ranks.

    The weights are exact in bf16 and the run's random numbers stay untouched.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = _TwiceUsed()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(_WIDTH)
            parameter.copy_(values.bfloat16())
    shape = (MICRO_BATCHES, world_size(), _ROWS)
    inputs = torch.randn(*shape, 2, _WIDTH, generator=generator).bfloat16().float()
    targets = torch.randn(*shape, _CLASSES, generator=generator)
    return model.to(device), inputs.to(device), targets.to(device)


def _reference_update(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The update that SGD makes of the mean loss of all rows, by the parameter's name, flat."""
    with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
        loss = (model(inputs.flatten(0, 2)) - targets.flatten(0, 2)).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {n: -_LR * g.flatten().cpu() for n, g in zip(names, gradients, strict=True)}


def _engine_update(engine: Engine, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The update that the engine makes of it, in the same form. Collective."""
    before = _master_weights(engine)
    parts = engine.world_size * MICRO_BATCHES
    for number in range(MICRO_BATCHES):
        with torch.enable_grad(), engine.accumulate(last=number == MICRO_BATCHES - 1):
            outputs = engine.forward(inputs[number, engine.rank])
            loss = (outputs - targets[number, engine.rank]).square().mean()
            engine.backward(loss / parts)
    engine.step(_LR, None)
    after = _master_weights(engine)
    return {name: (after[name] - values).cpu() for name, values in before.items()}


def _master_weights(engine: Engine) -> dict[str, Tensor]:
    """The whole master weights by name, flat: each rank adds its part. Collective."""
    shapes = engine.parameter_shapes()
    whole = {n: torch.zeros(shape.numel(), device=engine.device) for n, shape in shapes.items()}
    for part in engine.master_fragments():
        whole[part.name][part.start : part.start + len(part.values)] = part.values
    return FusedSum(whole).wait()


def _relative_error(update: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest relative error of any parameter's update."""
    errors = [(update[n] - right).norm() / right.norm() for n, right in reference.items()]
    return float(torch.stack(errors).max())  # NaN if any is


def _make_engine(accelerator: Accelerator, plan: ExecutionPlan, model: nn.Module) -> Engine:
    """Make the run's engine around another model. Collective."""
    own = copy.copy(accelerator)  # so that the run's would not save this model beside its own
    own._models, own._optimizers = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    if plan.stage is None:
        blocks = plan.shard.model_copy(update={"units": None, "min_parameters": 0})
        prepared, wrapped = prepare(own, model, optimizer, replace(plan, shard=blocks))
        return make_engine(own, prepared, wrapped, plan.precision, _SCALE)
    import deepspeed

    from hpdist.engines.zero3 import partition_weights

    values = _deepspeed_config(accelerator)
    if plan.stage == 3:
        partition_weights(model, values, accelerator.device)
    wrapped_model, wrapped, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=values
    )
    return make_engine(own, wrapped_model, wrapped)


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """The run's config of DeepSpeed, with this check's batch; what is on NVMe is on the CPU."""
    plugin = cast(Any, accelerator.state).deepspeed_plugin
    values = plain_section(copy.deepcopy(plugin.deepspeed_config))
    values.pop("train_batch_size", None)
    values["train_micro_batch_size_per_gpu"] = _ROWS
    values["gradient_accumulation_steps"] = MICRO_BATCHES
    values["gradient_clipping"] = 0.0
    values["fp16"]["loss_scale"] = _SCALE.static
    zero = values["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            zero[part] = {"device": "cpu"}
    return values


def _described(plan: ExecutionPlan, device: torch.device) -> str:
    """The engine in words."""
    kind = "DDP"
    if plan.shard.engine is not None:
        kind = f"FSDP2 of torch {importlib.metadata.version('torch')}"
    if plan.stage is not None:
        kind = f"ZeRO-{plan.stage} of DeepSpeed {importlib.metadata.version('deepspeed')}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    over = "1 rank" if world_size() == 1 else f"{world_size()} ranks over {backend}"
    precision = f"{plan.precision} with bf16 state" if plan.bf16_state else plan.precision
    return f"{kind}, {precision}, {over}"
