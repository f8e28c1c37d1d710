"""Sums over ranks: many small tensors in one collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.errors import HpdistError

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 if nothing was launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class FusedSum:
    """One all-reduce of a dict of fp32 tensors, in flight from construction until `wait`.

    Collective: every rank must construct it with the same names and shapes, in the same order.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in values.items()}
        self._flat = torch.cat([value.detach().reshape(-1).float() for value in values.values()])
        self._work: dist.Work | None = None
        if world_size() > 1:
            self._work = dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> dict[str, Tensor]:
        """The sums over all ranks, fp32, under their names and in their shapes."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = self._flat.split(sizes)
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks, in the tensor's own dtype. Collective: every rank must call."""
    total = value.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def rank_rows(own: Tensor) -> Tensor:
    """Place this rank's numbers [numbers] in its row of [ranks, numbers]; the sum has all rows."""
    lines = own.new_zeros(world_size(), len(own))
    lines[dist.get_rank() if world_size() > 1 else 0] = own
    return lines


_kept: list[Any] = []


def keep_group() -> None:
    """Keep the process group from being freed with the model, before the process ends.

    DDP's reducer can hold the last reference to it; freeing it then joins gloo's thread while the
    interpreter lock is held, which that thread may be waiting for.
    """
    if dist.is_available() and dist.is_initialized():
        _kept.append(dist.group.WORLD)
        time.sleep(0.1)  # gloo's thread releases its last work


def leave_group() -> None:
    """Leave the process group after a successful run. Collective: every rank must call."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        keep_group()
        dist.destroy_process_group()


def gathered(value: T) -> list[T]:
    """Every rank's value, in rank order. Collective: every rank must call."""
    everyone: list[T | None] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return cast(list[T], everyone)


def all_reduce_max(value: int) -> int:
    """The largest of all ranks' values. Collective: every rank must call."""
    return max(gathered(value))


def run_on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result, or raise its HpdistError, on all.

    Collective: every rank must call; the result is pickled.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except HpdistError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].everywhere = True
        raise outcome[1]
    return cast(T, outcome[0])


def call_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function on every rank; if it fails on any, raise the same error on all.

    Otherwise a rank that fails alone would leave the others waiting for ever. Collective: every
    rank must call; only HpdistErrors are shared.
    """
    result, error = None, None
    try:
        result = function()
    except HpdistError as raised:
        error = raised
    raise_together(error)
    return cast(T, result)


def raise_together(error: HpdistError | None) -> None:
    """Raise on all ranks the first error that any has. Collective: every rank must call."""
    error = next((e for e in gathered(error) if e is not None), None)
    if error is not None:
        error.everywhere = True
        raise error
