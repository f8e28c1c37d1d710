"""Batch normalisation over the global batch, in fp32, in step with the optimizer.

`torch.nn.SyncBatchNorm` needs a GPU, and in a half-precision engine its running statistics lose
precision. Here the batch statistics are those of all ranks, all arithmetic is fp32, and running
statistics move once per *applied* optimizer step, towards the statistics of all rows of the step:
those of the weak views and the student's own, whether they passed the model together or in two
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hpdist.distributed.collectives import world_size
from hpdist.distributed.config import NormStatistics
from hpdist.distributed.normalisation.function import normalise_globally, normalize_with_stats_of
from hpdist.distributed.normalisation.moments import moments_of, statistics_of
from hpdist.distributed.normalisation.records import Records
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.errors import ConfigError

_ONE_VALUE = (
    "model: batch normalisation receives one row at a time, which becomes all zeros; use a larger "
    "batch.labeled or batch.micro, or another normalisation (LayerNorm, GroupNorm)"
)


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d over the global batch. Input [rows, channels, *].

    Collective: in training mode every rank must call forward and backward the same number of times.
    """

    virtual_batches: tuple[int, ...] | None = None
    """Rows per independently normalised part of the input; None normalises all rows together."""

    statistics: NormStatistics = "global"
    """With `rank`, forward and backward do not communicate: each rank normalises by its own rows.

    The running statistics are those of all ranks in both cases; `RunningStatistics` combines them.
    """

    recording: bool = True
    """Whether passes in training count towards the running statistics."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records = Records(self.num_features, kwargs.get("device") or "cpu")

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name)
        if input.dim() < 2:
            raise ValueError(f"expected [rows, channels, ...], got {tuple(input.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalBatchNorm:
        """Move and cast like any module, but keep the running statistics in fp32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("running_mean", "running_var"):
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer.float())
        device = fn(self.records.compiled).device
        if device != self.records.compiled.device:
            self.records.move(device)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalise with the global batch's statistics in training, the running ones otherwise."""
        self._check_input_dim(input)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps
            )
        if self.virtual_batches is None or len(self.virtual_batches) == 1:
            return self._normalise(input, weight, bias)
        parts = input.split(self.virtual_batches)
        return torch.cat([self._normalise(part, weight, bias) for part in parts])

    def _normalise(self, rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        alone = world_size() == 1
        if alone and not len(rows):
            return rows
        if alone and rows.numel() == self.num_features:
            raise ConfigError(_ONE_VALUE)
        if (alone or self.statistics == "rank") and rows.numel() > self.num_features:
            return self._normalise_alone(rows, weight, bias)
        reduce = self.statistics == "global"
        normalised, moments = normalise_globally(rows, weight, bias, self.eps, reduce=reduce)
        if self._records_now():
            if torch.compiler.is_compiling():
                self._add(*statistics_of(moments, unbiased=True), moments[-1])
            else:
                self.records.moments.append(moments)
        return normalised

    def _normalise_alone(self, rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise by the statistics of these rows, with torch's own kernel.

        With momentum 1 it leaves the batch's mean and unbiased variance in the buffers. A pass that
        does not count has some too: activation checkpointing expects it to save as many tensors.
        """
        count, records = rows.numel() // self.num_features, self._records_now()
        compiling = torch.compiler.is_compiling()
        if records and not compiling:
            batch = self.records.new_batch(count, rows.device)
            mean, variance = batch.mean, batch.variance
        else:
            mean, variance = torch.zeros(2, self.num_features, device=rows.device).unbind()
        cudnn = torch.backends.cudnn.enabled
        normalised = torch.batch_norm(
            rows, weight, bias, mean, variance, True, 1.0, self.eps, cudnn
        )
        if records and compiling:
            self._add(mean, variance, count)
        return normalised

    def _records_now(self) -> bool:
        """Whether this pass counts; not where activation checkpointing recomputes it."""
        if not self.recording or self.running_mean is None:
            return False
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    @torch.no_grad()
    def _add(self, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
        """Record a pass in a compiled graph: mean and unbiased variance, fp32 [channels] each."""
        self.records.compiled.add_(moments_of(mean, variance, count))

    def normalize_with_stats_of(self, rows: Tensor, others: Tensor) -> Tensor:
        """Normalise `others` by the global batch's statistics of `rows`, fp32 [rows, channels].

        Both are [rows, channels], and gradient flows to both; running statistics do not change.
        It is collective where forward is.
        """
        virtual_batches = self.virtual_batches or (len(rows),)
        pairs = zip(rows.split(virtual_batches), others.split(virtual_batches), strict=True)
        reduce = self.statistics == "global"
        parts = [normalize_with_stats_of(*pair, self.eps, reduce=reduce) for pair in pairs]
        return torch.cat(parts)

    def commit(self) -> None:
        """Move the running statistics towards those of all rows since the last commit."""
        RunningStatistics([self]).commit()

    def discard(self) -> None:
        """Discard all passes since the last commit: the step was skipped."""
        RunningStatistics([self]).discard()


class GlobalBatchNormAct(GlobalBatchNorm):
    """Global batch normalisation with timm's dropout and activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalise, then drop and activate."""
        return cast(Tensor, self.act(self.drop(super().forward(input))))


def _replacement_of(model: _BatchNorm) -> type[GlobalBatchNorm]:
    """The class that replaces a BatchNorm globally. Raises ConfigError for unknown forwards."""
    kind = type(model)
    if kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return GlobalBatchNorm
    parts = {name for name, _ in model.named_children()}
    if kind.__module__.startswith("timm.") and parts == {"drop", "act"}:
        return GlobalBatchNormAct
    raise ConfigError(
        f"model: {kind.__module__}.{kind.__name__} is a BatchNorm with its own forward, which "
        "cannot be made global; use torch's, or another normalisation"
    )


def global_batch_norm(model: nn.Module, *, statistics: NormStatistics = "global") -> nn.Module:
    """Replace every BatchNorm in `model` by a `GlobalBatchNorm` with the same tensors.

    Call it before the model is prepared. Returns the model (a new one if it is itself a
    BatchNorm). With `statistics="rank"` each rank normalises by its own rows, which is faster, but
    makes training depend on the number of ranks. Raises ConfigError for a BatchNorm that does not
    compute the same as torch's.
    """
    model = _replaced(model)
    for norm in batch_norms(model):
        norm.statistics = statistics
    return model


def _replaced(model: nn.Module) -> nn.Module:
    if isinstance(model, _BatchNorm) and not isinstance(model, GlobalBatchNorm):
        replacement = _replacement_of(model)(
            model.num_features,
            model.eps,
            model.momentum,
            model.affine,
            model.track_running_stats,
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(replacement, name, getattr(model, name))
        if model.running_mean is not None:
            replacement.records.move(model.running_mean.device)
        for name, child in model.named_children():
            setattr(replacement, name, child)
        return replacement.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, _replaced(child))
    return model


def batch_norms(model: nn.Module) -> Iterator[GlobalBatchNorm]:
    """Every GlobalBatchNorm in the model."""
    return (m for m in model.modules() if isinstance(m, GlobalBatchNorm))
