"""Checks that need the whole run: does the batch divide, does the model fit the data."""

from __future__ import annotations

from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.config import RunConfig
from hpdist.data.decode import InputSpec
from hpdist.errors import ConfigError, describe
from hpdist.models.outputs import on_trial


def divide_batch(config: RunConfig, ranks: int, uses_unlabeled: bool) -> int:
    """The number of micro-batches per step and rank.

    Raises ConfigError where a global batch does not divide over ranks and micro-batches.
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
    per_rank = sum(sizes.values()) // ranks
    micro = config.batch.micro
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
    if spec.kind == "text" and (algorithm.groups is not None or algorithm.views.probed):
        raise ConfigError(
            f"algorithm.name: {type(algorithm).__name__} mixes inputs or adds to them, which text "
            "does not allow; choose one that does not, such as fixmatch"
        )
    waveforms = spec.kind == "audio" and spec.seen == spec.shape
    adds = algorithm.groups is not None or algorithm.views.probed
    if waveforms and (adds or "reconstruction" in algorithm.head_names):
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
