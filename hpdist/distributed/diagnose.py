"""What overflowed: found after the fact, so that a step without overflow pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.distributed.engine import Engine, EngineStep
from hpdist.distributed.reduce import world_size
from hpdist.errors import PrecisionError


@dataclass(frozen=True)
class Culprit:
    """Where a value left the range of the number format first."""

    rank: int
    term: str
    """Of the loss: supervised, unsupervised or the name of another."""
    module: str
    """The first module, in the order of computation, whose output or gradient is not finite."""
    where: Literal["forward", "backward", "weights"]

    def __str__(self) -> str:
        place = {"forward": "output of", "backward": "gradient at", "weights": "gradient of"}
        return f"rank {self.rank}, {self.term} term, {place[self.where]} {self.module}"


class OverflowHistory:
    """The latest skipped steps, to tell the story when they end the run."""

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        """Steps skipped in a row that are borne where no loss scale can fall."""
        self._in_a_row: list[tuple[int, float, Culprit | None]] = []

    def record(self, attempt: int, step: EngineStep, culprit: Culprit | None) -> None:
        """Take note of an attempt.

        Raises PrecisionError where the loss scale is at its minimum, or where none can fall and
        too many steps in a row were skipped.
        """
        if step.applied:
            self._in_a_row = []
            return
        self._in_a_row.append((attempt, step.old_scale, culprit))
        stuck = step.new_scale == step.old_scale and len(self._in_a_row) >= self.patience
        if step.exhausted or stuck:
            raise PrecisionError(self._story(step))

    def _story(self, step: EngineStep) -> str:
        skipped = self._in_a_row
        why = "gradients overflow though the loss scale is at its minimum"
        if not step.exhausted:
            why = f"{len(skipped)} steps in a row had gradients that are not finite"
        scales = ", ".join(f"{scale:g}" for _, scale, _ in skipped[-6:])
        culprits = [str(culprit) for _, _, culprit in skipped[-6:] if culprit is not None]
        named = "; ".join(dict.fromkeys(culprits)) or "none that shows again"
        return (
            f"{why} (attempts {skipped[0][0]} to {skipped[-1][0]}; last loss scales {scales}; "
            f"culprits: {named}); try a lower optim.lr, optim.grad_clip, bf16, or fp32 to find out "
            "why, and look at the rows of these steps"
        )


Terms = Callable[[Tensor], Mapping[str, Tensor]]


def find_culprit(engine: Engine, inputs: Tensor, terms: Terms) -> Culprit | None:
    """Go through a micro-batch again and name what overflowed first; None if nothing does.

    `terms` maps the student's logits to this rank's contributions, by term. Each is differentiated
    by itself at the present loss scale, without touching a parameter's gradient. Collective: every
    rank must call; all get the same answer, that of the lowest rank that found one.
    """
    found = None
    for name in sorted(terms(_logits(engine, inputs))):
        mine = _examine(engine, inputs, name, terms)
        found = found or mine
    everyone: list[Culprit | None] = [found]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, found)
    return next((culprit for culprit in everyone if culprit is not None), None)


@torch.no_grad()
def _logits(engine: Engine, inputs: Tensor) -> Tensor:
    return engine.infer(inputs)


def _examine(engine: Engine, inputs: Tensor, name: str, terms: Terms) -> Culprit | None:
    """Forward and backward of one term; every rank goes through all of it, whatever it finds."""
    inputs = inputs.detach().clone().requires_grad_()
    with torch.enable_grad(), _watched(engine.module) as seen:
        term = terms(engine.examine(inputs))[name]
        scaled = term * (engine.world_size * engine.loss_scale)
        parameters = engine.whole_parameters()
        gradients = torch.autograd.grad(scaled, [inputs, *parameters.values()], allow_unused=True)
    if seen:
        where, module = seen[0]
        if where == "backward" or not term.isfinite():
            return Culprit(engine.rank, name, module, where)
        return None  # the overflow is in another term's rows
    for parameter, gradient in zip(parameters, gradients[1:], strict=True):
        if gradient is not None and not gradient.isfinite().all():
            return Culprit(engine.rank, name, parameter, "weights")
    return None


@contextmanager
def _watched(
    model: nn.Module,
) -> Iterator[list[tuple[Literal["forward", "backward"], str]]]:
    """Note, in the order of computation, every leaf module that yields what is not finite."""
    seen: list[tuple[Literal["forward", "backward"], str]] = []

    def watch(name: str) -> Callable[..., None]:
        def note(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                seen.append(("backward", name))

        def look(module: nn.Module, arguments: object, output: object) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not output.isfinite().all():
                seen.append(("forward", name))
            if output.requires_grad:
                output.register_hook(note)

        return look

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
