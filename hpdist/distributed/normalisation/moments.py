"""Moments: the form in which ranks and passes add up their batch statistics.

They are each channel's sum and sum of squares, and the number of elements, as one float64 vector
[2 channels + 1]. Unlike means and variances they can be added, over ranks and over passes, and
their size does not depend on the number of ranks. Float64 keeps the variance: of values about 10^4
it tells squares 10^-8 apart, where a deviation of 10^-2 has a variance of 10^-4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def moments_of(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Moments, float64 [2 channels + 1], of elements with this mean and biased variance."""
    mean, variance = mean.double(), variance.double()
    number = torch.ones(1, dtype=torch.float64, device=mean.device) * count
    return torch.cat([mean * count, (variance + mean.square()) * count, number])


def statistics_of(moments: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance, fp32 [channels] each, of moments [2 channels + 1]."""
    channels = len(moments) // 2
    sums, squares, count = moments.split([channels, channels, 1])
    total = count.clamp(min=1)  # no rows anywhere: nothing to divide by
    mean = sums / total
    variance = (squares / total - mean.square()).clamp(min=0)
    if unbiased:
        variance = variance * (total / (total - 1).clamp(min=1))
    return mean.float(), variance.float()


def packed(mean: Tensor, deviations: Tensor, count: int, *, summed: bool) -> tuple[Tensor, Tensor]:
    """Do what `moments_of` does with fewer operations; also return a buffer, fp32, like it.

    The deviations are the squared ones from the mean: their sums if `summed`, else their averages.
    """
    channels = len(mean)
    one, factors = _factors(channels, count, summed, mean.device)
    buffer = torch.cat((mean, deviations, one))
    moments = buffer * factors
    sums, squares, _ = moments.split((channels, channels, 1))
    squares.addcmul_(sums, mean)
    return moments, buffer


def no_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of no rows, and a buffer, as `packed` returns them."""
    buffer = torch.zeros(2 * rows.shape[1] + 1, device=rows.device)
    return buffer.double(), buffer


def into_statistics(moments: Tensor, buffer: Tensor) -> Tensor:
    """Do what `statistics_of` does with fewer operations, into a buffer: means, variances, one.

    Without any rows they are NaN, and there is nothing to normalise by them.
    """
    channels = len(moments) // 2
    averages = moments / moments[-1:]
    means, squares, _ = averages.split((channels, channels, 1))
    squares.addcmul_(means, means, value=-1)
    return torch.maximum(averages, _least(channels, moments.device), out=buffer)  # also rounds


@functools.lru_cache(maxsize=1024)
def _factors(
    channels: int, count: int, summed: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A one, fp32 [1], and what statistics [2 channels + 1] are multiplied by, in float64."""
    factors = torch.full((2 * channels + 1,), float(count), dtype=torch.float64, device=device)
    if summed:
        factors[channels:-1] = 1
    return torch.ones(1, device=device), factors


@functools.lru_cache(maxsize=1024)
def _least(channels: int, device: torch.device) -> Tensor:
    """The least means, variances and share, float64: rounding may leave a variance below 0."""
    least = torch.zeros(2 * channels + 1, dtype=torch.float64, device=device)
    least[:channels] = -torch.inf
    return least
