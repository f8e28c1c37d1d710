"""Normalisation by the statistics of all ranks, with its gradient: one small all-reduce each way.

Layers follow each other, so their statistics cannot share a collective: one forward and one
backward for every layer and pass is the least that there can be.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.collectives import summed, world_size
from hpdist.distributed.normalisation import cpu, gpu
from hpdist.distributed.normalisation.layout import by_channel, dense, dense_like, other_dims
from hpdist.distributed.normalisation.moments import (
    into_statistics,
    moments_of,
    no_moments,
    statistics_of,
)


def normalise_globally(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, reduce: bool
) -> tuple[Tensor, Tensor]:
    """Normalise rows [rows, channels, *] by the statistics of all ranks' rows, in fp32.

    Returns the normalised rows and the moments, float64 [2 channels + 1], without gradient. Without
    `reduce` the statistics are those of this rank. Collective with it: forward and backward each do
    one all-reduce.
    """
    function: Any = _Traced.apply if torch.compiler.is_compiling() else _Eager.apply
    return cast(tuple[Tensor, Tensor], function(rows, weight, bias, eps, reduce))


def normalize_with_stats_of(rows: Tensor, others: Tensor, eps: float, *, reduce: bool) -> Tensor:
    """Normalise `others` by the statistics of all ranks' `rows`, both [rows, channels]; fp32.

    Gradient flows to both. Collective with `reduce`, as `normalise_globally` is.
    """
    values = rows.double()
    count = values.new_full((1,), len(rows))
    own = torch.cat([values.sum(dim=0), values.square().sum(dim=0), count])
    function: Any = _Sum.apply if reduce and world_size() > 1 else lambda moments: moments
    mean, variance = statistics_of(function(own))
    return (others.float() - mean) * (variance + eps).rsqrt()


class _Sum(torch.autograd.Function):
    """The sum over all ranks: one all-reduce forward, one backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return summed(own)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return summed(grad_outputs[0].contiguous())


class _Eager(torch.autograd.Function):
    """The function by as few kernels as there can be, since each of the small ones costs a call."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        reduce: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, channels = dense(rows), rows.shape[1]
        kernels = _kernels(rows)
        moments, buffer = kernels.moments(rows) if rows.numel() else no_moments(rows)
        if reduce:
            dist.all_reduce(moments)
        statistics = into_statistics(moments, buffer)
        ctx.save_for_backward(rows, weight, statistics, moments)
        ctx.eps, ctx.reduce = eps, reduce
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)  # zeros for the moments would be made in vain
        if not rows.numel():
            return torch.empty_like(rows), moments
        mean, variance, _ = statistics.split((channels, channels, 1))
        return kernels.normalised(rows, weight, bias, mean, variance, eps), moments

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, statistics, moments = ctx.saved_tensors
        if not rows.numel():  # this rank only helps the others
            none = torch.zeros(2, rows.shape[1], device=rows.device)
            if ctx.reduce:
                dist.all_reduce(none.new_zeros(2 * rows.shape[1]))
            affine = (None, None) if weight is None else none.unbind()
            return torch.empty_like(rows), *affine, None, None
        mean, variance, _ = statistics.split((rows.shape[1], rows.shape[1], 1))
        grad_rows, grad_weight, grad_bias = _kernels(rows).gradients(
            dense_like(grad_outputs[0], rows),
            *(rows, weight, mean, variance, moments, ctx.eps, ctx.reduce),
        )
        if weight is None:
            return grad_rows, None, None, None, None
        return grad_rows, grad_weight, grad_bias, None, None


def _kernels(rows: Tensor) -> ModuleType:
    return gpu if rows.is_cuda else cpu


class _Traced(torch.autograd.Function):
    """The function in plain operations, for the compiler to fuse; it keeps collectives in order."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        reduce: bool,
    ) -> tuple[Tensor, Tensor]:
        count, dims, values = rows.numel() // rows.shape[1], other_dims(rows), rows.float()
        if count:
            mean = values.mean(dims)
            variance = (values - by_channel(mean, rows)).square().mean(dims)
        else:  # no rows on this rank: weight 0
            mean = variance = torch.zeros(rows.shape[1], device=rows.device)
        moments = moments_of(mean, variance, count)
        if reduce:
            dist.all_reduce(moments)
        mean, variance = statistics_of(moments)
        inverse_std = (variance + eps).rsqrt()
        ctx.save_for_backward(rows, weight, mean, inverse_std, moments)
        ctx.reduce = reduce
        ctx.mark_non_differentiable(moments)
        out = (values - by_channel(mean, rows)) * by_channel(inverse_std, rows)
        out = out if weight is None else out * by_channel(weight, rows)
        out = out if bias is None else out + by_channel(bias, rows)
        return out.to(rows.dtype), moments

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse_std, moments = ctx.saved_tensors
        dims, grad = other_dims(rows), grad_outputs[0].float()
        normalised = (rows.float() - by_channel(mean, rows)) * by_channel(inverse_std, rows)
        grad_bias, grad_weight = grad.sum(dims), (grad * normalised).sum(dims)
        sums = torch.stack((grad_bias, grad_weight))
        if ctx.reduce:
            dist.all_reduce(sums)
        offset, slope = (sums / moments[-1].clamp(min=1)).unbind()
        scale = inverse_std if weight is None else inverse_std * weight
        centred = grad - by_channel(offset, rows) - normalised * by_channel(slope, rows)
        grad_rows = (centred * by_channel(scale, rows)).to(rows.dtype)
        if weight is None:
            return grad_rows, None, None, None, None
        return grad_rows, grad_weight, grad_bias, None, None
