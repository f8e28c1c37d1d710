"""What tracing a model for another program begins with: its inputs and outputs in an order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hpdist.data.structures import Structure, tensors_of
from hpdist.errors import describe
from hpdist.evaluate.export.metadata import input_names
from hpdist.evaluate.loaded import LoadedModel
from hpdist.models.outputs import outputs_of


class Positional(nn.Module):
    """Takes the inputs as one tuple and gives the outputs as another, in the order of names."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None, outputs: Sequence[str]):
        super().__init__()
        self.model = model
        self.names, self.outputs = names, outputs

    def forward(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give the task's outputs for what the plain view makes of rows."""
        given: Any = rows[0] if self.names is None else dict(zip(self.names, rows, strict=True))
        return tuple(tensors_of(outputs_of(self.model(given), self.outputs)))


def positional(loaded: LoadedModel) -> tuple[Positional, list[str], tuple[Tensor, ...]]:
    """Give a model that takes tensors in an order, their names, and two rows of them."""
    rows: Structure = loaded.views.plain(loaded.spec.example(2))
    names = list(rows) if isinstance(rows, Mapping) else None
    assert loaded.model is not None
    model = Positional(loaded.model, names, loaded.task.outputs).eval()
    return model, input_names(rows), tuple(tensors_of(rows))


def shapes_of(
    names: Sequence[str], given: Sequence[Tensor], sizes: Sequence[Mapping[int, Any]]
) -> dict[str, Any]:
    """Give dtype and shape of each input by name; a size in `sizes` is None, any number."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [None if at in size else n for at, n in enumerate(tensor.shape)],
        }
        for name, tensor, size in zip(names, given, sizes, strict=True)
    }


def first_line(error: Exception) -> str:
    """Give the first line of what an error began with."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return describe(error).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, converters report failures by raising alone."""
    silenced = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in silenced]
    before = logging.root.manager.disable
    try:
        for logger in silenced:
            logger.setLevel(logging.CRITICAL)
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for logger, level in zip(silenced, levels, strict=True):
            logger.setLevel(level)
