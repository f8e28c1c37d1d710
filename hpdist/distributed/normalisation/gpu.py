"""Kernels of batch normalisation by statistics of several ranks, on a GPU.

They are those of torch's SyncBatchNorm, with the moments of `moments.py` in place of an all-gather
whose size grows with the ranks, and without its wait for the device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.normalisation.moments import packed


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's moments, float64, and a buffer like them in fp32."""
    mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
    return packed(mean, variance, rows.numel() // rows.shape[1], summed=False)


def normalised(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """The rows normalised by these statistics, in their own dtype."""
    return torch.batch_norm_elemt(rows, weight, bias, mean, (variance + eps).rsqrt_(), eps)


def gradients(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    whole: Tensor,
    eps: float,
    reduce: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients towards rows, weight and bias; `whole` are the moments of all ranks."""
    inverse_std, affine = (variance + eps).rsqrt_(), weight is not None
    grad_sum, product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
        grad, rows, mean, inverse_std, weight, True, affine, affine
    )
    sums = torch.cat((grad_sum, product))
    if reduce:
        dist.all_reduce(sums)
    grad_sum, product = sums.chunk(2)
    grad_rows = torch.batch_norm_backward_elemt(
        grad, rows, mean, inverse_std, weight, grad_sum, product, whole[-1:].int()
    )
    return grad_rows, grad_weight, grad_bias
