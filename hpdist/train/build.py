"""Builds a run's step from its config: algorithm, model, optimizer, and what shards them."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.engines.execution_plan import Sharding
from hpdist.engines.prepare import prepare
from hpdist.train import opening
from hpdist.train.checks import check_inputs
from hpdist.train.compose import compose
from hpdist.train.config import RunConfig
from hpdist.train.data import Objects, RunData
from hpdist.train.generations import initial_values
from hpdist.train.given import check_classes
from hpdist.train.model import RunModel
from hpdist.train.optim import build_optimizer
from hpdist.train.step import SemiSupervisedStep


def build_step(
    config: RunConfig,
    objects: Objects,
    data: RunData,
    accelerator: Accelerator,
    sharding: Sharding,
    micro_batches: int,
    run_model: RunModel,
) -> tuple[SemiSupervisedStep, dict[str, Tensor]]:
    """Build what trains, and the values that every generation's student begins with.

    Raises ConfigError on all ranks. Collective.
    """
    main = accelerator.is_main_process
    algorithm = _make_algorithm(config, objects, data, accelerator)
    check_inputs(algorithm, data.unlabeled_spec)
    model = run_model.make(algorithm)
    initial = initial_values(model, algorithm.generations)
    opening.say_model(config, model, micro_batches, main)
    optimizer = build_optimizer(model, config.optim)
    replicated = algorithm.views.teacher and sharding.stage == 3
    model, optimizer = prepare(accelerator, model, optimizer)
    # Not before: ZeRO-3 has by now let go of the first model's whole weights.
    replica = run_model.make(algorithm) if replicated else None
    step = SemiSupervisedStep(
        accelerator,
        model,
        optimizer,
        algorithm,
        data.views,
        micro_batches=micro_batches,
        decay=config.teacher.decay,
        teacher_warmup=config.teacher.warmup,
        grad_clip=sharding.grad_clip,
        precision=sharding.precision,
        loss_scale=config.loss_scale,
        teacher_model=replica,
        seed=config.run.seed,
        l1=config.optim.l1,
    )
    return step, initial


def _make_algorithm(
    config: RunConfig, objects: Objects, data: RunData, accelerator: Accelerator
) -> Algorithm:
    """The algorithm with its add-ons, told how much data there is."""
    check_classes(objects.algorithm, data.num_classes)
    algorithm = compose(config, data.num_classes, accelerator.device, data.task)
    algorithm.rows = data.unlabeled_rows
    algorithm.class_counts = data.class_counts
    return algorithm
