"""Checks that need the whole run: does the batch divide, does the model fit the data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hpdist.algorithms.addon import compose
from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.mixing import check_group_sizes
from hpdist.config import RunConfig
from hpdist.data.decode import InputSpec
from hpdist.errors import ConfigError, describe
from hpdist.models.outputs import on_trial


def divide_batch(config: RunConfig, ranks: int, uses_unlabeled: bool) -> int:
    """The number of micro-batches per step and rank.

    Raises ConfigError where a global batch does not divide over ranks and micro-batches, or where
    too few rows are left to be mixed with one another.
    """
    sizes = {"batch.labeled": config.batch.labeled}
    if uses_unlabeled:
        sizes["batch.unlabeled"] = config.batch.unlabeled
    for setting, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"{setting}: {size} rows do not divide over {ranks} ranks; use "
                f"{_multiples(size, ranks)}"
            )
    count = _micro_batches(config.batch.micro, sizes, ranks)
    algorithm = compose(config)
    if uses_unlabeled and algorithm.groups is not None:
        rows = {setting.removeprefix("batch."): size for setting, size in sizes.items()}
        name = type(algorithm).__name__
        check_group_sizes(name, algorithm.groups, rows, ranks * count, algorithm.mixed)
    return count


def _micro_batches(micro: int | None, sizes: Mapping[str, int], ranks: int) -> int:
    """How many micro-batches a rank's rows make; raises ConfigError where they are not equal."""
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
    """Raise ConfigError where the algorithm cannot use inputs such as the unlabelled ones."""
    if spec.kind == "text" and algorithm.changes_inputs:
        raise ConfigError(
            f"algorithm.name: {type(algorithm).__name__} mixes inputs, adds to them or gives them "
            "back, which text does not allow; choose one that does not, such as fixmatch"
        )
    waveforms = spec.kind == "audio" and spec.seen == spec.shape
    if waveforms and algorithm.changes_inputs:
        raise ConfigError(
            f"algorithm.name: {type(algorithm).__name__} mixes inputs, adds to them or gives them "
            "back, which waveforms of different lengths do not allow; set views.spectrogram: true, "
            "or choose one that does not, such as fixmatch"
        )
    if spec.beside is not None and algorithm.views.uses_unlabeled and not algorithm.views.strong:
        raise ConfigError(
            f"views.strong_column: {type(algorithm).__name__} makes no strong view of unlabelled "
            "rows; leave it out, or choose an algorithm that does, such as fixmatch"
        )


def check_model(model: nn.Module, example: Tensor, num_classes: int) -> None:
    """Raise ConfigError unless the model maps [rows, *] to [rows, num_classes]."""
    try:
        with on_trial(model):
            output = model(example)
    except Exception as error:
        raise ConfigError(
            f"model: it fails on inputs of shape {list(example.shape)}: {describe(error)}"
        ) from error
    logits = getattr(output, "logits", output)
    expected = (len(example), num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model: it maps inputs {list(example.shape)} to {found}, "
            f"expected logits {list(expected)}: [rows, classes]"
        )
