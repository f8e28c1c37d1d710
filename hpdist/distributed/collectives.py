"""Sums over ranks: many small tensors in one collective; and small objects.

Objects are pickled. What every rank is to know of every other one is ranks x ranks in all, so it is
kept to what is small and of a bounded size, and none of it is needed in a step: errors cost a
number unless there is one, and what only the first rank writes down goes to the first rank.
`tests/unit/distributed/test_object_collectives.py` lists all uses with their bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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


class AllRanks:
    """Reductions over all ranks. Collective: every rank must call, with the same shapes."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return world_size()

    def sum(self, value: Tensor) -> Tensor:
        """Give the sum over the ranks, in the tensor's own dtype."""
        return summed(value)

    def max(self, value: Tensor) -> Tensor:
        """Give the largest over the ranks, in the tensor's own dtype."""
        found = value.clone()
        if world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found


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
    """Every rank's value, in rank order, on every rank; it must be small and of a bounded size.

    Collective: every rank must call; the values are pickled.
    """
    everyone: list[T | None] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return cast(list[T], everyone)


def gathered_on_main(value: T) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others.

    Collective: every rank must call; the values are pickled.
    """
    if world_size() == 1:
        return [value]
    everyone: list[T | None] | None = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone)
    return cast(list[T] | None, everyone)


def reports(value: T | None) -> dict[int, T]:
    """What ranks have to report, by rank; usually none has anything, which costs one number.

    Collective: every rank must call; the values are pickled.
    """
    if not any_rank(value is not None):
        return {}
    return {rank: each for rank, each in enumerate(gathered(value)) if each is not None}


def any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank. Collective: every rank must call."""
    return all_reduce_max(int(flag)) > 0


def all_reduce_max(value: int) -> int:
    """The largest of all ranks' values. Collective: every rank must call."""
    return _reduced([value], dist.ReduceOp.MAX)[0]


def sums(values: Sequence[int]) -> list[int]:
    """The sums over all ranks of a few integers. Collective: every rank must call."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: Sequence[int], operation: Any) -> list[int]:
    if world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # some groups have NCCL alone
    numbers = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(numbers, operation)
    return cast(list[int], numbers.tolist())


def run_on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result, or raise its HpdistError, on all.

    Collective: every rank must call; the result is pickled. It must not grow with the ranks.
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
    errors = reports(error)
    if errors:
        first = next(iter(errors.values()))
        first.everywhere = True
        raise first
