"""Gradients laid out as DDP's buckets expect them.

A weight with a dimension of 1, such as that of a 1 x 1 convolution, has the same memory layout in
channels-last order as in the usual one; only its strides are written differently. If inputs are
channels-last, its gradient has the strides of that order, and DDP warns in every run that they
differ from its bucket's, and copies the gradients slowly.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn


def keep_strides(parameters: Iterable[nn.Parameter]) -> None:
    """Have gradients of weights with a dimension of 1 written with the weight's own strides."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.dim() > 2 and 1 in parameter.shape:
            parameter.register_hook(partial(_like, parameter.shape, parameter.stride()))


def _like(shape: tuple[int, ...], strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """Return the same elements with the strides of the other order."""
    if gradient.stride() == strides or not gradient.is_contiguous():
        return gradient
    return gradient.as_strided(shape, strides)
