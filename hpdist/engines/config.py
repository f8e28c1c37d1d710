"""The config of precision, sharding, the loss scale and the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hpdist.config.section import Section
from hpdist.engines.compilation import Compile

Precision = Literal["fp32", "bf16", "fp16"]
AskedPrecision = Literal["fp32", "bf16", "fp16", "fp8"]
"""What a config may name: fp8 is bf16 with the products of linear layers in fp8."""


class Zero(Section):
    """How DeepSpeed shards; by default as the accelerate config file says."""

    stage: int | None = Field(None, ge=0, le=3)
    """What is sharded: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters.

    Unset means no DeepSpeed.
    """
    offload: Literal["none", "cpu", "nvme"] | None = None
    """Where the optimizer's state is kept (from stage 1), and in stage 3 the parameters too."""
    nvme_path: str | None = None
    """A folder on the local NVMe disk, for `offload: nvme`."""
    bf16_master_weights_and_grads: bool | None = None
    """Keep the master weights in bf16 instead of fp32, from stage 1; needs the next setting too."""
    bf16_optimizer_states: bool | None = None
    """Keep the optimizer's state in bf16 instead of fp32; needs the setting before."""

    @model_validator(mode="after")
    def _possible(self) -> Zero:
        offload = self.offload or "none"
        if offload != "none" and self.stage == 0:
            raise ValueError(f"offload: {offload} needs stage 1, 2 or 3; stage 0 shards nothing")
        if offload == "nvme" and self.stage is not None and self.stage < 3:
            raise ValueError("offload: nvme needs stage 3")
        if offload == "nvme" and not self.nvme_path:
            raise ValueError("offload: nvme needs nvme_path, a folder on the local disk")
        return self


class Shard(Section):
    """How FSDP2 shards; by default as the accelerate config file says."""

    engine: Literal["fsdp2"] | None = None
    """fsdp2 shards weights, gradients and optimizer state by torch itself, without DeepSpeed."""
    reshard_after_forward: bool | None = None
    """Release a unit's weights after each forward, and gather them again; true by default.

    false gathers each unit once a step and keeps it until the backward pass has used it.
    """
    offload: Literal["none", "cpu"] | None = None
    """Where a rank's part of weights and optimizer state is kept."""
    units: list[str] | None = None
    """Names of the classes whose modules are gathered one by one; by default the model's blocks."""
    min_parameters: int | None = Field(None, ge=0)
    """By default a block is a unit if it has at least so many parameters: 100,000."""


class LossScale(Section):
    """The loss scale of fp16; one number for all ranks and all terms."""

    static: float | None = Field(None, gt=0)
    """A fixed scale; dynamic by default."""
    initial: float = Field(2.0**16, gt=0)
    """The dynamic scale to start with, a power of 2."""
    growth_interval: int = Field(1000, gt=0)
    """Steps without overflow after which the dynamic scale doubles."""
    minimum: int = Field(1, ge=1)
    """Where the dynamic scale stops falling: another overflow then ends the run."""

    @field_validator("initial")
    @classmethod
    def _power_of_two(cls, value: float) -> float:
        if math.frexp(value)[0] != 0.5:
            raise ValueError(f"must be a power of 2, such as 65536, not {value:g}")
        return value


class Teacher(Section):
    """The exponential moving average of the weights, used for evaluation."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Share of the average that each step keeps."""
    warmup: bool = True
    """Start with the smaller decay (1 + t) / (10 + t), so that early weights are forgotten."""


@dataclass(frozen=True)
class ExecutionRequest:
    """A run's requirements of the engine, to be merged with those of the launcher and its files."""

    precision: AskedPrecision | None = None
    zero: Zero = field(default_factory=Zero)
    shard: Shard = field(default_factory=Shard)
    loss_scale: LossScale = field(default_factory=LossScale)
    grad_clip: float | None = None
    """Largest global gradient norm."""
    compile: bool | Compile = False
    find_unused_parameters: bool = False
    patience: float | None = None
    """Seconds without progress after which the compilation of an operator ends the run."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings by dotted name that a DeepSpeed JSON's optimizer and scheduler sections
    are compared with: `optim.…`, `schedule.…` and `steps`."""
