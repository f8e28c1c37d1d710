"""Kernels of batch normalisation by statistics of several ranks, on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.normalisation.layout import by_channel, other_dims
from hpdist.distributed.normalisation.moments import packed


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's moments, float64, and a buffer like them in fp32.

    Sums are precise and quick on a CPU in every layout of memory. `torch.var_mean` is twenty times
    as slow, and `torch.batch_norm_update_stats` loses precision where channels come last.
    """
    dims = other_dims(rows)
    mean = rows.mean(dims, dtype=torch.float32)
    deviations = (rows - by_channel(mean, rows)).square_().sum(dims)
    return packed(mean, deviations, rows.numel() // rows.shape[1], summed=True)


def normalised(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """The rows normalised by these statistics, in their own dtype."""
    return torch.batch_norm(rows, weight, bias, mean, variance, False, 0.0, eps, False)


def gradients(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    whole: Tensor,
    eps: float,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients towards rows, weight and bias; `whole` are the moments of all ranks.

    Torch's backward for constant mean and variance gives the two sums that are needed. The rest of
    the gradient is an affine map of the rows, channel by channel.
    """
    grad, values = grad.float(), rows.float()
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, values, weight, mean, variance, None, None, False, eps, [False, True, True]
    )
    sums = torch.cat((grad_bias, grad_weight))
    if reduce:
        dist.all_reduce(sums)
    scale = (variance + eps).rsqrt_()
    scale = scale if weight is None else scale * weight
    offset, slope = (sums.view(2, -1) * scale).div_(whole[-1]).neg_()
    out = normalised(values, slope, offset, mean, variance, eps)
    out.addcmul_(grad, by_channel(scale, rows))
    return out.to(rows.dtype), grad_weight, grad_bias
