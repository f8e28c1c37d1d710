"""Batch normalisation over the global batch, in fp32, in step with the optimizer.

`torch.nn.SyncBatchNorm` needs a GPU, and in a half-precision engine its running statistics lose
precision. Here the batch statistics are those of all ranks, all arithmetic is fp32, and running
statistics move once per *applied* optimizer step, towards the statistics of all rows of the step:
those of the weak views and the student's own, whether they passed the model together or in two
passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hpdist.distributed.collectives import summed, world_size
from hpdist.errors import ConfigError

_PassStatistics: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""One pass: elements per channel on all ranks, mean and unbiased variance."""


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes: list[_PassStatistics] = []
        _keep_from_compiler()

    def __setstate__(self, state: Any) -> None:
        """Restore what was pickled, perhaps in another process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _keep_from_compiler()

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
        mean = torch.zeros(self.num_features, device=rows.device)
        variance = torch.ones(self.num_features, device=rows.device)
        elements = torch.tensor(float(rows.numel() // self.num_features), device=rows.device)
        if world_size() == 1:
            if not len(rows):
                return rows
            if rows.numel() == self.num_features:
                raise ConfigError(_ONE_VALUE)
            # With momentum 1 torch leaves the batch's mean and unbiased variance in the buffers.
            normalised = F.batch_norm(rows, mean, variance, weight, bias, True, 1.0, self.eps)
        else:
            function: Any = _NormaliseGlobally.apply
            normalised = function(rows, weight, bias, self.eps, mean, variance, elements)
        if torch._C._current_graph_task_id() == -1:  # not when activation checkpointing recomputes
            self._passes.append((elements, mean, variance))
        return normalised

    def normalize_with_stats_of(self, rows: Tensor, others: Tensor) -> Tensor:
        """Normalise `others` by the global batch's statistics of `rows`, fp32 [rows, channels].

        Both are [rows, channels], and gradient flows to both; running statistics do not change.
        It is collective where forward is.
        """
        virtual_batches = self.virtual_batches or (len(rows),)
        pairs = zip(rows.split(virtual_batches), others.split(virtual_batches), strict=True)
        return torch.cat([_normalize_with_stats_of(*pair, self.eps) for pair in pairs])

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics towards those of all rows since the last commit."""
        if self._passes and self.running_mean is not None and self.running_var is not None:
            mean, variance = _combine(self._passes)
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance, momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        self._passes = []

    def discard_pass(self) -> None:
        """Discard the latest pass."""
        if self._passes:
            self._passes.pop()

    def discard(self) -> None:
        """Discard all passes since the last commit: the step was skipped."""
        self._passes = []


@functools.cache
def _keep_from_compiler() -> None:
    """Exclude from compilation the methods that communicate or store statistics.

    Not by decorators: they would import torch's compiler wherever this module is imported, which
    takes as long as importing torch itself.
    """
    for name in ("_normalise", "normalize_with_stats_of"):
        setattr(GlobalBatchNorm, name, torch.compiler.disable(getattr(GlobalBatchNorm, name)))


def _combine(passes: list[_PassStatistics]) -> tuple[Tensor, Tensor]:
    """Mean and variance of several passes together, weighted by their sizes."""
    if len(passes) == 1:
        return passes[0][1], passes[0][2]
    total = torch.stack([elements for elements, _, _ in passes]).sum()
    shares = [elements / total for elements, _, _ in passes]
    mean = sum((s * m for s, (_, m, _) in zip(shares, passes, strict=True)), torch.zeros(()))
    variance = sum(
        (s * (v + (m - mean).square()) for s, (_, m, v) in zip(shares, passes, strict=True)),
        torch.zeros(()),
    )
    return mean, variance


def _normalize_with_stats_of(rows: Tensor, others: Tensor, eps: float) -> Tensor:
    values = rows.double()
    own = torch.cat([values.sum(dim=0), values.square().sum(dim=0), _number(len(rows), values)])
    mean, variance, _ = _combined(_summed(own))
    normalised: Tensor = (others.float() - mean) * (variance + eps).rsqrt()
    return normalised


def _moments(mean: Tensor, variance: Tensor, count: int) -> Tensor:
    """Sums, sums of squares and the number of elements, float64 [2 channels + 1].

    Unlike means and variances they can be added over the ranks in one reduction, whose size does
    not depend on their number. Float64 keeps the variance: of values about 10^4 it tells squares
    10^-8 apart, where a deviation of 10^-2 has a variance of 10^-4.
    """
    mean, variance = mean.double(), variance.double()
    return torch.cat([mean * count, (variance + mean.square()) * count, _number(count, mean)])


def _combined(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, fp32 [channels], and the number of elements, fp32 [1]."""
    channels = len(moments) // 2
    sums, squares, count = moments.split([channels, channels, 1])
    total = count.clamp(min=1)  # no rows anywhere: nothing to divide by
    mean = sums / total
    variance = (squares / total - mean.square()).clamp(min=0)
    return mean.float(), variance.float(), count.float()


def _number(value: int, like: Tensor) -> Tensor:
    return like.new_tensor([float(value)])


def _summed(own: Tensor) -> Tensor:
    """Every rank's vector added up, [*], with gradient."""
    if world_size() == 1:
        return own
    function: Any = _Sum.apply
    return cast(Tensor, function(own))


class _Sum(torch.autograd.Function):
    """One all-reduce forward, one backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return summed(own)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return summed(grad_outputs[0].contiguous())


class _NormaliseGlobally(torch.autograd.Function):
    """Normalisation over all ranks: one all-reduce of O(channels) forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mean_out: Tensor,
        variance_out: Tensor,
        total_out: Tensor,
    ) -> Tensor:
        dims = [d for d in range(rows.dim()) if d != 1]
        count = rows.numel() // rows.shape[1]
        if count:
            variance, mean = torch.var_mean(rows.float(), dims, correction=0)  # [channels] each
        else:  # no rows on this rank: weight 0
            variance, mean = torch.zeros(2, rows.shape[1], device=rows.device)
        mean, variance, elements = _combined(summed(_moments(mean, variance, count)))
        total = elements.clamp(min=1)
        total_out.copy_(elements[0])
        mean_out.copy_(mean)
        variance_out.copy_(variance * (total / (total - 1).clamp(min=1)))
        ctx.save_for_backward(rows, weight, mean, (variance + eps).rsqrt(), total)
        return F.batch_norm(rows, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse_std, total = ctx.saved_tensors
        dims = [d for d in range(rows.dim()) if d != 1]
        shape = [1, -1] + [1] * (rows.dim() - 2)
        grad = grad_outputs[0].float()
        normalised = (rows.float() - mean.view(shape)) * inverse_std.view(shape)
        sums = torch.stack([grad.sum(dims), (grad * normalised).sum(dims)])  # [2, channels]
        grad_bias, grad_weight = sums.clone()
        dist.all_reduce(sums)
        mean_grad, mean_product = (sums / total).view(2, *shape)
        scale = inverse_std if weight is None else inverse_std * weight
        grad_rows = scale.view(shape) * (grad - mean_grad - normalised * mean_product)
        has_affine = weight is not None
        return (
            grad_rows.to(rows.dtype),
            grad_weight if has_affine else None,
            grad_bias if has_affine else None,
            None,
            None,
            None,
            None,
        )


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


def global_batch_norm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm in `model` by a `GlobalBatchNorm` with the same tensors.

    Call it before the model is prepared. Returns the model (a new one if it is itself a
    BatchNorm). Raises ConfigError for a BatchNorm that does not compute the same as torch's.
    """
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
        for name, child in model.named_children():
            setattr(replacement, name, child)
        return replacement.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, global_batch_norm(child))
    return model


def batch_norms(model: nn.Module) -> Iterator[GlobalBatchNorm]:
    """Every GlobalBatchNorm in the model."""
    return (m for m in model.modules() if isinstance(m, GlobalBatchNorm))
