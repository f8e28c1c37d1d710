"""Builds a run's step from its config: algorithm, model, optimizer, and what shards them."""

from __future__ import annotations

import copy
from dataclasses import replace

from accelerate import Accelerator
from torch import Tensor, nn

from hpdist import opening
from hpdist.algorithms.addon import compose
from hpdist.algorithms.base import Algorithm
from hpdist.checks import check_gradient, check_inputs, check_model
from hpdist.config import RunConfig
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.distributed.engine import prepare
from hpdist.distributed.launch import Sharding
from hpdist.distributed.reduce import agreed
from hpdist.generations import initial_values
from hpdist.given import check_classes
from hpdist.models.build import build_model
from hpdist.models.full_precision import to_full_precision
from hpdist.models.heads import with_heads
from hpdist.models.memory import checkpoint_activations
from hpdist.models.stored import weights_as_stored
from hpdist.optim import build_optimizer
from hpdist.run_data import Objects, RunData
from hpdist.step import SemiSupervisedStep


def build_step(
    config: RunConfig,
    objects: Objects,
    data: RunData,
    accelerator: Accelerator,
    sharding: Sharding,
    micro_batches: int,
) -> tuple[SemiSupervisedStep, dict[str, Tensor]]:
    """Build what trains, and the values that every generation's student begins with.

    Raises ConfigError on all ranks. Collective.
    """
    main = accelerator.is_main_process
    algorithm = _make_algorithm(config, objects, data, accelerator)
    check_inputs(algorithm, data.unlabeled_spec)
    model = _make_model(config, objects, data, sharding, algorithm, main)
    initial = initial_values(model, algorithm.generations)
    opening.say_model(config, model, micro_batches, main)
    optimizer = build_optimizer(model, config.optim)
    replicated = algorithm.views.teacher and sharding.stage == 3
    own = replace(objects, model=copy.deepcopy(objects.model)) if replicated else objects
    model, optimizer = prepare(accelerator, model, optimizer)
    # Not before: ZeRO-3 has by now let go of the first model's whole weights.
    replica = _make_model(config, own, data, sharding, algorithm, main) if replicated else None
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


def _make_model(
    config: RunConfig,
    objects: Objects,
    data: RunData,
    sharding: Sharding,
    algorithm: Algorithm,
    main: bool,
) -> nn.Module:
    """Build the model, or take the one that was given; checked against the data. Collective."""

    def build() -> nn.Module:
        model = objects.model
        if model is None:
            model = build_model(config.model, data.spec, data.num_classes, config.run.seed)
        opening.say_lines(filter(None, [to_full_precision(model)]), main)
        model = global_batch_norm(model)
        example = data.views.plain(data.spec.example(2))
        trains = check_model(model, example, data.num_classes)
        model = with_heads(model, algorithm, example, getattr(config.model, "features", None))
        if not trains:
            check_gradient(model, example)
        if config.activation_checkpointing:
            checkpoint_activations(model)
        return model

    with weights_as_stored(sharding.stage == 3):
        model = agreed(build)
    if sharding.compile is not None:
        model.compile(**sharding.compile)  # in place: the parameters keep their names
    return model
