"""Parts of a run's config for the lower packages: its algorithm, and its engine's requirements."""

from __future__ import annotations

from typing import Any, cast

import torch

from hpdist.algorithms.addons.base import build_algorithm
from hpdist.algorithms.base import Algorithm
from hpdist.engines.config import ExecutionRequest
from hpdist.tasks.base import Task, TaskConfig
from hpdist.train.config import RunConfig


def compose(
    config: RunConfig,
    num_classes: int = 2,
    device: torch.device | str = "cpu",
    task: Task | None = None,
) -> Algorithm:
    """Make the algorithm of a run, with its add-ons; raises what `build_algorithm` does."""
    algorithm, addons = (cast(Any, part) for part in (config.algorithm, config.addons))
    task = task or cast(TaskConfig, config.task).build()
    outputs = task.output_size(num_classes)
    return build_algorithm(algorithm, addons, outputs, device, config.steps, task)


def execution_request(config: RunConfig) -> ExecutionRequest:
    """Return a run's requirements of the engine."""
    training = {"steps": config.steps}
    for name in ("optim", "schedule"):
        section = getattr(config, name)
        training |= {f"{name}.{key}": getattr(section, key) for key in type(section).model_fields}
    return ExecutionRequest(
        precision=config.precision,
        zero=config.zero,
        shard=config.shard,
        loss_scale=config.loss_scale,
        grad_clip=config.optim.grad_clip,
        compile=config.compile,
        find_unused_parameters=config.find_unused_parameters,
        patience=config.watchdog.seconds,
        training=training,
    )
