"""The layout in memory in which a CPU convolves faster: channels last.

oneDNN then need not reorder what goes into and comes out of each convolution. What is computed is
the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpdist.data.decode.spec import InputSpec
from hpdist.data.structures import Structure, tensors_of

_CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class Convolves(Protocol):
    """A model that may have convolutions, and rows to try it on."""

    @property
    def model(self) -> Any:
        """The model itself."""
        ...

    @property
    def spec(self) -> InputSpec:
        """How rows are decoded."""
        ...

    def outputs(self, inputs: Structure) -> Structure:
        """Give the outputs for decoded rows."""
        ...


@contextmanager
def channels_last(model: Convolves) -> Iterator[None]:
    """Inside, the two-dimensional convolutions of a model on the CPU have their weights so.

    A model that cannot work with it, such as one that views activations as contiguous, stays as it
    is. Afterwards each weight is the tensor that it was.
    """
    kept = [(conv.weight, conv.weight.data) for conv in _convolutions(model.model)]
    try:
        if kept:
            example = model.spec.example(2)
            expected = model.outputs(example)
            for weight, data in kept:
                weight.data = data.contiguous(memory_format=torch.channels_last)
            if not _gives(model, example, expected):
                _restore(kept)
        yield
    finally:
        _restore(kept)


def _convolutions(model: Any) -> list[nn.Conv2d]:
    """Those on the CPU whose weight is a parameter of their own."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [
        module
        for module in modules
        if isinstance(module, nn.Conv2d)
        and isinstance(module._parameters.get("weight"), Tensor)
        and module.weight.device.type == "cpu"
    ]


def _gives(model: Convolves, example: Structure, expected: Structure) -> bool:
    try:
        found = model.outputs(example)
    except RuntimeError:  # it views what is not contiguous
        return False
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    return all(torch.allclose(one, other, **_CLOSE, equal_nan=True) for one, other in pairs)


def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    for weight, data in kept:
        weight.data = data
