"""Parameters of shapes and kinds that DeepSpeed does not take as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hpdist.distributed.names import named_parameters, shortened
from hpdist.errors import ConfigError


def check_shardable(model: nn.Module) -> None:
    """Raise ConfigError for what DeepSpeed cannot train: it would cast it and lose half of it."""
    unfit = [name for name, p in named_parameters(model) if p.is_complex() and p.requires_grad]
    if unfit:
        raise ConfigError(
            f"model: {shortened(unfit)} is complex, which DeepSpeed does not train; leave zero.stage "
            "out to train with DDP, or keep real and imaginary parts as two parameters"
        )


@contextmanager
def with_dimensions(model: nn.Module) -> Iterator[None]:
    """Inside, parameters without dimensions have one, of one element, in the same memory.

    DeepSpeed sends every parameter as bytes when it starts, and torch views no tensor without
    dimensions as bytes.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    try:
        yield
    finally:
        for parameter in scalars:
            if parameter.numel() == 1:
                parameter.data = parameter.data.view(())
