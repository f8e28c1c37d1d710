"""Checks that need the whole run: whether the batch divides and the model fits the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.parts.mixing import check_group_sizes
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import kind_named
from hpdist.data.structures import Structure, describe_rows, row_count, tensors_of
from hpdist.distributed.module_names import shortened
from hpdist.errors import ConfigError, describe
from hpdist.models.outputs import (
    LOGITS,
    NO_GRADIENT,
    find_logits,
    has_gradient_in_training,
    on_trial,
    outputs_of,
)
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import Task
from hpdist.train.config import Batch


def divide_batch(batch: Batch, algorithm: Algorithm, ranks: int) -> int:
    """The number of micro-batches per step and rank.

    Raises ConfigError if a global batch does not divide over ranks and micro-batches, or if too few
    rows are left for mixing.
    """
    sizes = {"batch.labeled": batch.labeled}
    uses_unlabeled = algorithm.views.uses_unlabeled
    if uses_unlabeled:
        sizes["batch.unlabeled"] = batch.unlabeled
    for setting, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"{setting}: {size} rows do not divide over {ranks} ranks; use "
                f"{_multiples(size, ranks)}"
            )
    count = _micro_batches(batch.micro, sizes, ranks)
    if uses_unlabeled and algorithm.groups is not None:
        rows = {setting.removeprefix("batch."): size for setting, size in sizes.items()}
        name = type(algorithm).__name__
        check_group_sizes(name, algorithm.groups, rows, ranks * count, algorithm.mixed)
    return count


def _micro_batches(micro: int | None, sizes: Mapping[str, int], ranks: int) -> int:
    """The number of micro-batches of a rank's rows; raises ConfigError if they are not equal."""
    per_rank = sum(sizes.values()) // ranks
    if micro is None or micro >= per_rank:
        return 1
    count = per_rank // micro
    if per_rank % micro or any(size // ranks % count for size in sizes.values()):
        fitting = sorted(
            per_rank // n
            for n in range(1, per_rank + 1)
            if all(size // ranks % n == 0 for size in sizes.values())
        )
        raise ConfigError(
            f"batch.micro: {micro} rows do not divide each rank's {per_rank} rows ("
            + ", ".join(f"{size // ranks} of {setting}" for setting, size in sizes.items())
            + f") into equal micro-batches; possible: {', '.join(map(str, fitting))}"
        )
    return count


def _multiples(size: int, ranks: int) -> str:
    below, above = size // ranks * ranks, -(-size // ranks) * ranks
    return f"{below} or {above}" if below else str(above)


def check_inputs(algorithm: Algorithm, spec: InputSpec) -> None:
    """Raise ConfigError if the algorithm cannot use inputs like the unlabelled ones."""
    why = kind_named(spec.kind).refuses(spec, algorithm)
    if why is not None:
        raise ConfigError(why)


def check_model(
    model: nn.Module, example: Structure, num_classes: int, task: Task = DEFAULT_TASK
) -> bool:
    """Raise ConfigError unless what the model makes of [rows, *] is what the task goes by.

    `num_classes` is how many classes or targets the labels have. Returns whether the model's
    outputs have a gradient.
    """
    try:
        # A gradient would keep alive the fp32 copies of half-precision weights.
        with on_trial(model, gradient=not _is_as_stored(model)):
            output = model(example)
    except Exception as error:
        raise ConfigError(
            f"model: it fails on inputs of shape {describe_rows(example)}: {describe(error)}"
        ) from error
    rows, plain = row_count(example), tuple(task.outputs) == LOGITS
    found: Any = find_logits(output) if plain else outputs_of(output, task.outputs)
    shapes = f"it maps inputs {describe_rows(example)} to {_shown(output)}"
    task.check_outputs(found, rows, num_classes, shapes)
    if plain and not found.is_floating_point():
        raise ConfigError(f"model: its logits are {found.dtype}, expected floating-point numbers")
    return any(tensor.requires_grad for tensor in tensors_of(found))


def _is_as_stored(model: nn.Module) -> bool:
    """Whether weights are in half precision: read as fp32 copies, which have no gradient."""
    return any(getattr(parameter, "as_stored", False) for parameter in model.parameters())


def check_gradient(model: nn.Module, example: Structure, outputs: Sequence[str] = LOGITS) -> None:
    """Raise ConfigError if training could not change a model.

    For a model whose outputs have no gradient in evaluation. Every rank must call.
    """
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(
            f"model: none of the {len(parameters)} parameters of {type(model).__name__} is trained "
            "(requires_grad is False), so there is nothing to train; leave at least the last layer "
            "trained"
        )
    if _is_as_stored(model):
        return
    try:
        trains = has_gradient_in_training(model, example, outputs)
    except Exception as error:
        raise ConfigError(
            f"model: it fails in training on inputs of shape {describe_rows(example)}: "
            f"{describe(error)}"
        ) from error
    if not trains:
        raise ConfigError(NO_GRADIENT)


def _shown(output: Any) -> object:
    """Describe a model's output for a message: a tensor's shape, or its type and names."""
    found = find_logits(output)
    if isinstance(found, Tensor):
        return list(found.shape)
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} of {', '.join(map(str, found)) or 'nothing'}, no logits"
    return type(found).__name__


def check_given_model(model: nn.Module) -> None:
    """Raise ConfigError for a module that cannot be trained as it was given in Python."""
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise ConfigError(
            f"model: it is already wrapped in {type(model).__name__}; give the module inside, "
            "model.module: hpdist wraps it itself"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"model: {shortened(lazy)} has no shape yet (a lazy layer); call the model once on a "
            "batch of your data first, or use a layer whose sizes are given"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unmade = [name for name, tensor in tensors if tensor.is_meta]
    if unmade:
        raise ConfigError(
            f"model: {shortened(unmade)} is on the meta device, so it has no values; build the "
            "model on the CPU, or call model.to_empty(device='cpu') and load its weights"
        )
