"""Prepare model and optimizer, and make the engine for how they were prepared."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hpdist.distributed.collectives import world_size
from hpdist.engines.base import Engine
from hpdist.engines.config import LossScale, Precision
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.fsdp2_shard import fully_shard, is_sharded, sharding_of
from hpdist.engines.replicated import ReplicatedEngine
from hpdist.errors import DistributedError
from hpdist.messages.progress import working


def ranks_train_separately(accelerator: Accelerator) -> bool:
    """Whether several processes run that the Accelerator does not join in one training."""
    launched = max(int(os.environ.get("WORLD_SIZE", "1")), world_size())
    return launched > 1 and accelerator.distributed_type == DistributedType.NO


@working("preparing the model and the optimizer for training")
def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sharding: ExecutionPlan | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Call `accelerator.prepare`, with weights that are already sharded under ZeRO-3.

    It would itself cast the whole model and move it to the device before sharding. FSDP2 replaces
    it, if the plan of the run says so. Collective: every rank must call.
    """
    if sharding is not None and sharding.shard.engine is not None:
        precision, shard = sharding.precision, sharding.shard
        return fully_shard(accelerator, model, optimizer, precision=precision, shard=shard)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return cast(tuple[nn.Module, torch.optim.Optimizer], accelerator.prepare(model, optimizer))
    from hpdist.engines.zero3 import partition_weights
    from hpdist.engines.zero_shapes import check_shardable, leave_out_empty, with_dimensions

    check_shardable(model)
    if plugin.deepspeed_config["zero_optimization"]["stage"] == 3:
        leave_out_empty(optimizer)
        partition_weights(model, plugin.deepspeed_config, accelerator.device)
    with with_dimensions(model):
        return cast(tuple[nn.Module, torch.optim.Optimizer], accelerator.prepare(model, optimizer))


def make_engine(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision | None = None,
    loss_scale: LossScale | None = None,
) -> Engine:
    """Make the engine for a model and an optimizer that `accelerator.prepare` returned."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _zero_engine(accelerator, model, optimizer)
    if is_sharded(model):
        return _sharded_engine(accelerator, model, optimizer, loss_scale)
    if ranks_train_separately(accelerator):
        raise DistributedError(
            "several ranks were launched, but this Accelerator leaves each to train by itself; "
            "on CPU ranks make it with Accelerator(cpu=True)"
        )
    return ReplicatedEngine(accelerator, model, optimizer, precision, loss_scale)


def _sharded_engine(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None,
) -> Engine:
    """Make the engine for a model that `hpdist.fully_shard` has sharded."""
    from hpdist.engines.fsdp2 import ShardedEngine

    sharded = sharding_of(model)
    if sharded is None:
        raise DistributedError(
            "the model was sharded by FSDP2, but not by hpdist.fully_shard, which averages "
            "gradients in fp32; call it in place of accelerator.prepare or torch's fully_shard"
        )
    return ShardedEngine(accelerator, model, optimizer, sharded, loss_scale)


def _zero_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Engine:
    """Make the engine for the stage that DeepSpeed was configured with."""
    from hpdist.engines.zero import ZeroEngine
    from hpdist.engines.zero0 import UnshardedEngine
    from hpdist.engines.zero3 import PartitionedEngine

    stage = int(cast(Any, model).zero_optimization_stage())
    kinds = {0: UnshardedEngine, 1: ZeroEngine, 2: ZeroEngine, 3: PartitionedEngine}
    return kinds[stage](accelerator, model, optimizer)
