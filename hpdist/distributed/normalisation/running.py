"""The running statistics of all layers of a model, in step with the optimizer.

A commit takes a handful of operations on flat tensors, whatever the number of layers and passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.collectives import world_size
from hpdist.distributed.config import NormStatistics
from hpdist.distributed.normalisation.records import Records

_MOMENTUM = 0.1  # of a layer that names none
_MOST_PLANS = 64


class Layer(Protocol):
    """A layer with running statistics; `GlobalBatchNorm` implements it."""

    num_features: int
    momentum: float | None
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    records: Records
    statistics: NormStatistics
    recording: bool
    virtual_batches: tuple[int, ...] | None


class RunningStatistics:
    """Moves the running statistics of several layers together.

    Args:
        norms: Layers on one device; those without running statistics are left alone.
    """

    def __init__(self, norms: Iterable[Layer]) -> None:
        self.norms = list(norms)
        self._tracked = [norm for norm in self.norms if norm.running_mean is not None]
        self._sizes = [norm.num_features for norm in self._tracked]
        self._per_rank = any(norm.statistics == "rank" for norm in self._tracked)
        for norm in self._tracked:
            if norm.records.compiled.device != norm.running_mean.device:
                norm.records.move(norm.running_mean.device)
        self._plans: dict[tuple[int, ...], Tensor] = {}
        self._momenta: Tensor | None = None

    @torch.no_grad()
    def commit(self) -> None:
        """Move towards the statistics of all rows since the last commit, of all ranks.

        Collective if the layers normalise by the statistics of each rank: one all-reduce.
        """
        total = self._total()
        if total is not None:
            self._move(total)
            ran = [norm for norm in self._tracked if norm.records.any()]
            counters = [n.num_batches_tracked for n in ran if n.num_batches_tracked is not None]
            torch._foreach_add_(counters, 1)
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Discard all passes since the last commit: the step was skipped."""
        batches = [batch.statistics for norm in self._tracked for batch in norm.records.batches]
        if batches:  # the next statistics are added to 0 times these, which may not be finite
            torch._foreach_zero_(batches)
        for norm in self._tracked:
            norm.records.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, passes leave nothing behind for the running statistics."""
        before = [norm.recording for norm in self.norms]
        for norm in self.norms:
            norm.recording = False
        try:
            yield
        finally:
            for norm, recording in zip(self.norms, before, strict=True):
                norm.recording = recording

    def _total(self) -> Tensor | None:
        """Sums, sums of squares and numbers of elements, float64 [3, channels of all layers].

        Passes weigh as much as they have elements, and each counts with its unbiased variance.
        """
        records = [norm.records for norm in self._tracked]
        batches = [(n, each.values) for n, r in enumerate(records) for each in r.batches]
        moments = [(n, each) for n, r in enumerate(records) for each in r.moments]
        compiled = [(n, r.compiled) for n, r in enumerate(records) if r.compiled_ran]
        totals = []
        if batches:
            mean, variance, count = self._passes(batches).double().unbind(1)
            sums = mean * count
            squares = (sums * mean).addcmul_(variance, count)
            totals.append(torch.stack((sums, squares, count)).sum(1))
        if moments:
            totals.append(_unbiased(self._passes(moments)).sum(0))
        if compiled:
            totals.append(self._passes(compiled).sum(0))
        if not totals:
            return None
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        if self._per_rank and world_size() > 1:
            dist.all_reduce(total)
        return total

    def _passes(self, records: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Records of layers by number, as [passes, 3, channels of all layers], 0 where missing."""
        values = [each for _, each in records]
        key = tuple(number for number, _ in records)
        if key not in self._plans or self._plans[key].device != values[0].device:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = _plan(key, self._sizes).to(values[0].device)
        return torch.cat([*values, values[0].new_zeros(1)])[self._plans[key]]

    def _move(self, total: Tensor) -> None:
        """Move the running statistics towards those of summed moments."""
        elements = total[2]
        divisor = elements.clamp(min=1)
        averages = total[:2] / divisor
        mean, variance = averages
        variance.addcmul_(mean, mean, value=-1).clamp_(min=0)
        if self._momenta is None or self._momenta.device != total.device:
            self._momenta = self._momentum_by_channel(total.device)
        weights = ((elements > 0) * self._momenta).split(self._sizes)  # 0 where no rows came
        means, variances = (each.split(self._sizes) for each in averages.float())
        running = [norm.running_mean for norm in self._tracked]
        running += [norm.running_var for norm in self._tracked]
        torch._foreach_lerp_(running, [*means, *variances], [*weights, *weights])

    def _momentum_by_channel(self, device: torch.device) -> Tensor:
        momenta = [_MOMENTUM if n.momentum is None else n.momentum for n in self._tracked]
        sizes = torch.tensor(self._sizes)
        return torch.tensor(momenta).repeat_interleave(sizes).to(device)


def _unbiased(passes: Tensor) -> Tensor:
    """Moments [passes, 3, channels] with the unbiased variance of each pass in place of its own."""
    sums, squares, count = passes.unbind(1)
    of_means = sums * sums / count.clamp(min=1)
    factor = count / (count - 1).clamp_(min=1)
    squares.sub_(of_means).mul_(factor).add_(of_means)
    return passes


def _plan(layers: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Where concatenated records of these layers, and a zero behind them, have each number.

    The result is [passes, 3, channels of all layers].
    """
    starts = list(accumulate((2 * sizes[layer] + 1 for layer in layers), initial=0))
    offsets = list(accumulate(sizes, initial=0))
    passes = max(layers.count(layer) for layer in set(layers))
    plan = torch.full((passes, 3, offsets[-1]), starts[-1])
    numbers = [0] * len(sizes)
    for layer, start in zip(layers, starts, strict=False):
        size, offset = sizes[layer], offsets[layer]
        channels = torch.arange(size)
        columns = plan[numbers[layer], :, offset : offset + size]
        columns.copy_(torch.stack([start + channels, start + size + channels, channels * 0]))
        columns[2] = start + 2 * size
        numbers[layer] += 1
    return plan
