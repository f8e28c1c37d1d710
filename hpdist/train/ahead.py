"""The next step's views, made while the device still computes this step.

A step waits for the device once, for the norm of its gradient. What the next step needs of its rows
depends on neither: it is dispatched before that wait, so that the device finds it done and goes on
with the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from hpdist.algorithms.protocol import MicroBatch
from hpdist.algorithms.view_request import Views
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.train.micro_batch import MicroBatcher

Batches: TypeAlias = "tuple[LabeledBatch[Any, Any], UnlabeledBatch[Any] | None]"
Following: TypeAlias = Callable[[], "Batches | None"]
"""Gives the next step's batches, if they are at hand, after seeding what views may draw from."""


@dataclass(frozen=True)
class _Made:
    """The micro-batches of one step, and all that they were made for."""

    batches: Batches
    attempt: int
    views: Views
    micros: list[MicroBatch]
    generators: Generators


class ViewsAhead:
    """Keeps the micro-batches of the next step until that step takes them.

    Whatever comes between, such as other rows, another attempt or views that raise an error, the
    step then makes its own: it is the same with and without this.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def make(self, cutter: MicroBatcher, following: Following, attempt: int) -> None:
        """Make the views of a later attempt, if its rows are at hand."""
        self._made = None
        with kept_generators():
            batches = following()
            if batches is None:
                return
            try:
                micros = list(cutter.split(*batches, attempt))
            except Exception:
                return  # it comes again in the step that it belongs to, when this one is done
            made = _Made(batches, attempt, cutter.algorithm.views, micros, Generators.now())
        self._made = made

    def take(
        self, cutter: MicroBatcher, batches: Batches, attempt: int
    ) -> Sequence[MicroBatch] | None:
        """Give the micro-batches of an attempt if they have been made, from these very batches."""
        made, self._made = self._made, None
        if made is None or (made.attempt, made.views) != (attempt, cutter.algorithm.views):
            return None
        if any(one is not other for one, other in zip(made.batches, batches, strict=True)):
            return None
        made.generators.restore()
        return made.micros


@dataclass(frozen=True)
class Generators:
    """The states of the generators that views and models may draw from."""

    torch_state: torch.Tensor
    cuda_state: torch.Tensor | None
    python_state: Any
    numpy_state: Any

    @classmethod
    def now(cls) -> Generators:
        """Read the present states; nothing waits for the device."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.torch_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the generators as they are, whatever is drawn inside."""
    kept = Generators.now()
    try:
        yield
    finally:
        kept.restore()
