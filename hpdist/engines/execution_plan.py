"""How a run computes and shards: the merged settings of config and launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpdist.engines.config import LossScale, Precision, Shard

Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run computes and shards: the merged settings of config and launcher."""

    precision: Precision = "fp32"
    fp8: bool = False
    """Whether linear layers multiply in fp8, while the rest computes in bf16."""
    stage: int | None = None
    """The ZeRO stage; None without DeepSpeed."""
    offload: Offload = "none"
    nvme_path: str | None = None
    shard: Shard = field(default_factory=Shard)
    """The settings of FSDP2, if `shard.engine` names it."""
    bf16_state: bool = False
    """Whether master weights and optimizer state are in bf16 instead of fp32."""
    grad_clip: float | None = None
    loss_scale: LossScale = field(default_factory=LossScale)
    micro_batch: int = 1
    """Rows per device per forward."""
    accumulation: int = 1
    """Micro-batches of a step."""
    deepspeed: str | None = None
    """The DeepSpeed JSON that the launcher named."""
    base: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The part of it for DeepSpeed: the base of the run's own config."""
    compile: Mapping[str, Any] | None = None
    """The arguments of `torch.compile`; None if the model is not compiled."""
    find_unused: bool = False
    """Whether DDP looks for parameters that a backward will not reach."""
    asked_accumulation: tuple[int, str] | None = field(default=None, compare=False)
    """The micro-batches of a step that the launcher asks for, and where it does."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """A line for each launcher setting that the run does not follow."""
    patience: float | None = field(default=None, compare=False)
    """Seconds without progress after which the compilation of an operator ends the run."""

    @property
    def is_sharded(self) -> bool:
        """Whether DeepSpeed or FSDP2 trains, and not one process alone or DDP."""
        return self.stage is not None or self.shard.engine is not None

    @property
    def name(self) -> str:
        """How the run is sharded, in words."""
        if self.shard.engine is not None:
            return "FSDP2"
        return "not sharded" if self.stage is None else f"ZeRO stage {self.stage}"

    @property
    def offloads_to(self) -> Offload:
        """Where the optimizer's state is kept, by either engine."""
        return self.offload if self.shard.engine is None else self.shard.offload or "none"

    def described(self) -> dict[str, object]:
        """Return the parts that a tracker records, by name."""
        return {
            "precision": "fp8" if self.fp8 else self.precision,
            "zero_stage": "none" if self.stage is None else self.stage,
            "shard_engine": self.shard.engine or "none",
            "offload": self.offloads_to,
            "master_weights": "bf16" if self.bf16_state else "fp32",
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
        }
