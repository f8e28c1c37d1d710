"""The kernels of torch's SyncBatchNorm, which exist for GPUs only, in plain torch for CPUs.

They let tests run on a CPU what is meant for a GPU: torch's own `SyncBatchNorm`, and the path of
`GlobalBatchNorm` that calls these kernels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_LIBRARY: list[torch.library.Library] = []


@functools.cache
def register_reference_kernels() -> None:
    """Register the kernels for CPU tensors, for as long as this process lives."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        library.impl(kernel.__name__, kernel, "CPU")
    _LIBRARY.append(library)


def batch_norm_stats(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation, fp32 [channels]."""
    variance, mean = torch.var_mean(rows.float(), _other_dims(rows), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    rows: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics of all ranks from each rank's, [ranks, channels]; update the running ones."""
    shares = (counts / counts.sum()).view(-1, 1)
    whole = (shares * mean).sum(dim=0)
    variances = inverse_std.pow(-2) - eps
    variance = (shares * (variances + (mean - whole).square())).sum(dim=0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(whole, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return whole, (variance + eps).rsqrt()


def batch_norm_elemt(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    eps: float,
) -> Tensor:
    """Normalised rows, in the rows' dtype."""
    out = (rows.float() - _channels(mean, rows)) * _channels(inverse_std, rows)
    out = out if weight is None else out * _channels(weight.float(), rows)
    out = out if bias is None else out + _channels(bias.float(), rows)
    return out.to(rows.dtype)


def batch_norm_backward_reduce(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the gradient and of its product with the centred rows; the affine gradients."""
    centred = rows.float() - _channels(mean, rows)
    total = grad.float().sum(_other_dims(rows))
    product = (grad.float() * centred).sum(_other_dims(rows))
    return total, product, product * inverse_std, total.clone()


def batch_norm_backward_elemt(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """The gradient towards the rows, in the rows' dtype; `count` int32 holds each rank's number."""
    assert count.dtype == torch.int32
    total = count.sum()
    slope = _channels(sum_dy_xmu / total * inverse_std.square(), rows)
    centred = rows.float() - _channels(mean, rows)
    scale = inverse_std if weight is None else inverse_std * weight.float()
    out = grad.float() - _channels(sum_dy / total, rows) - centred * slope
    return (out * _channels(scale, rows)).to(rows.dtype)


def _other_dims(rows: Tensor) -> list[int]:
    return [dim for dim in range(rows.dim()) if dim != 1]


def _channels(values: Tensor, rows: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (rows.dim() - 2))
