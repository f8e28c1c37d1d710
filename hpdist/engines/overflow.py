"""The source of an overflow: found afterwards, so that a step without overflow costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpdist.data.structures import Structure, map_tensors, tensors_of
from hpdist.distributed.collectives import gathered
from hpdist.engines.base import Engine, EngineStep
from hpdist.errors import PrecisionError


@dataclass(frozen=True)
class OverflowSource:
    """Where a value first left the range of the number format."""

    rank: int
    term: str
    """The term of the loss: supervised, unsupervised or another's name."""
    module: str
    """The first module, in the order of computation, whose output or gradient is not finite."""
    where: Literal["forward", "backward", "weights"]

    def __str__(self) -> str:
        place = {"forward": "output of", "backward": "gradient at", "weights": "gradient of"}
        return f"rank {self.rank}, {self.term} term, {place[self.where]} {self.module}"


class OverflowHistory:
    """The latest skipped steps, for the message when they end the run."""

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        """Steps skipped in a row that are tolerated if no loss scale can fall."""
        self._in_a_row: list[tuple[int, float, OverflowSource | None]] = []

    def record(self, attempt: int, step: EngineStep, source: OverflowSource | None) -> None:
        """Record an attempt.

        Raises PrecisionError if the loss scale is at its minimum, or if none can fall and too many
        steps in a row were skipped.
        """
        if step.applied:
            self._in_a_row = []
            return
        self._in_a_row.append((attempt, step.old_scale, source))
        stuck = step.new_scale == step.old_scale and len(self._in_a_row) >= self.patience
        if step.exhausted or stuck:
            raise PrecisionError(self._describe(step))

    def _describe(self, step: EngineStep) -> str:
        skipped = self._in_a_row
        why = "gradients overflow although the loss scale is at its minimum"
        if not step.exhausted:
            why = f"{len(skipped)} steps in a row had gradients that are not finite"
        scales = ", ".join(f"{scale:g}" for _, scale, _ in skipped[-6:])
        sources = [str(source) for _, _, source in skipped[-6:] if source is not None]
        named = "; ".join(dict.fromkeys(sources)) or "none that shows again"
        return (
            f"{why} (attempts {skipped[0][0]} to {skipped[-1][0]}; last loss scales {scales}; "
            f"sources: {named}); try a lower optim.lr, optim.grad_clip, bf16, or fp32 to find out "
            "why, and look at the rows of these steps"
        )


Terms = Callable[[Any], Mapping[str, Tensor]]


def find_overflow_source(engine: Engine, inputs: Structure, terms: Terms) -> OverflowSource | None:
    """Repeat a micro-batch and find what overflowed first; None if nothing does.

    `terms` maps the student's outputs to this rank's contributions, by term. Each is differentiated
    by itself at the present loss scale, without touching a parameter's gradient. A value on one
    rank can spread to the others (through global batch normalisation), so the earliest finding of
    all ranks counts. Collective: every rank must call; all get the same answer.
    """
    names = list(terms(engine.infer(inputs)))
    findings = [_probe_forward(engine, inputs, name, terms) for name in names]
    by_term = [finding for term in zip(*gathered(findings), strict=True) for finding in term]
    found = [finding for finding in by_term if finding is not None]
    return min(found, key=lambda f: f.tick).source if found else None  # the first of several


@dataclass(frozen=True)
class _Finding:
    source: OverflowSource
    tick: int  # the number of modules before, forward and backward


def _probe_forward(engine: Engine, inputs: Structure, name: str, terms: Terms) -> _Finding | None:
    """Run forward and backward of one term; every rank runs all of it, whatever it finds."""
    inputs = map_tensors(_leaf, inputs)
    leaves = [tensor for tensor in tensors_of(inputs) if tensor.requires_grad]
    with torch.enable_grad(), _watched(engine.module) as watch:
        term = terms(engine.probe_forward(inputs))[name]
        scaled = term * (engine.world_size * engine.loss_scale)
        parameters = engine.whole_parameters()
        # Integer inputs have no gradient: then use that of the first module's output.
        leaves = leaves or watch.first_outputs
        gradients = _gradients(scaled, [*leaves, *parameters.values()])
    if watch.first is not None:
        tick, where, module = watch.first
        if where == "forward" and term.isfinite():
            return None  # it is in the rows of another term
        return _Finding(OverflowSource(engine.rank, name, module, where), tick)
    for parameter, gradient in zip(parameters, gradients[len(leaves) :], strict=True):
        if gradient is not None and not gradient.isfinite().all():
            return _Finding(OverflowSource(engine.rank, name, parameter, "weights"), watch.ticks)
    return None


def _leaf(tensor: Tensor) -> Tensor:
    """Return the numbers as leaves that require a gradient, if they are floating-point."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _gradients(loss: Tensor, towards: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The loss's gradients; None if there is none."""
    if not towards or not loss.requires_grad:
        return [None] * len(towards)
    return torch.autograd.grad(loss, towards, allow_unused=True)


def _tensors_in(output: object) -> Iterator[Tensor]:
    """The floating-point tensors of whatever a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list, Mapping)):
        parts = output.values() if isinstance(output, Mapping) else output
        for part in parts:
            yield from _tensors_in(part)


class _Watch:
    """Records the first leaf module, in the order of computation, whose result is not finite."""

    def __init__(self) -> None:
        self.ticks = 0
        self.first_outputs: list[Tensor] = []
        """The first module's output that has a gradient."""
        self.first: tuple[int, Literal["forward", "backward"], str] | None = None

    def see(self, values: Tensor, where: Literal["forward", "backward"], name: str) -> None:
        """Check a module's output, or the gradient of it."""
        self.ticks += 1
        if self.first is None and not values.isfinite().all():
            self.first = (self.ticks, where, name)

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook for a module."""

        def look(module: nn.Module, arguments: object, output: object) -> None:
            with_gradient = []
            for tensor in _tensors_in(output):
                self.see(tensor, "forward", name)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.see(gradient, "backward", name))
                    with_gradient.append(tensor)
            self.first_outputs = self.first_outputs or with_gradient

        return look


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Watch every leaf module of a model."""
    watch = _Watch()
    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [module.register_forward_hook(watch.hook(name)) for name, module in leaves]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
