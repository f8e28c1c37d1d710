"""Which elements of which parameter a rank owns: the common language of DDP and every ZeRO stage.

A fragment is a run of one parameter's elements, in row-major order. Teacher and checkpoints speak
of fragments only, so neither knows how an engine shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.reduce import world_size


@dataclass(frozen=True)
class Fragment:
    """`values` are elements `start` to `start + len(values)` of the parameter called `name`."""

    name: str
    start: int
    values: Tensor  # [elements], fp32, a live view where the engine allows it

    def like(self, values: Tensor) -> Fragment:
        """The same place with other values."""
        return Fragment(self.name, self.start, values)


def partition(sizes: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Cut tensors of these sizes, laid end to end, into `ranks` even parts; give part `rank`.

    Returns (index, start, stop) per tensor that the part overlaps.
    """
    total = sum(sizes)
    share = -(-total // ranks)
    low, high = min(rank * share, total), min((rank + 1) * share, total)
    pieces, offset = [], 0
    for index, size in enumerate(sizes):
        start, stop = max(low - offset, 0), min(high - offset, size)
        if start < stop:
            pieces.append((index, start, stop))
        offset += size
    return pieces


class Partition:
    """Even shares of tensors that are whole on every rank; each rank takes its own."""

    def __init__(self, tensors: Mapping[str, Tensor], rank: int, ranks: int) -> None:
        self._names = list(tensors)
        self._pieces = partition([t.numel() for t in tensors.values()], rank, ranks)

    def cut(self, tensors: Mapping[str, Tensor]) -> list[Fragment]:
        """Views of this rank's share of tensors of the same names and sizes."""
        pieces = []
        for index, start, stop in self._pieces:
            name = self._names[index]
            if name in tensors:
                pieces.append(Fragment(name, start, tensors[name].detach().view(-1)[start:stop]))
        return pieces

    def named(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """The values of a whole cut, as fragments again."""
        return [
            Fragment(self._names[index], start, values)
            for (index, start, _), values in zip(self._pieces, parts, strict=True)
        ]

    @staticmethod
    def uncut(tensors: Mapping[str, Tensor]) -> list[Fragment]:
        """Views of tensors as they are, whole."""
        return [Fragment(name, 0, tensor.view(-1)) for name, tensor in tensors.items()]

    @staticmethod
    def state_tensors(
        parameters: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[str, dict[str, Tensor]]:
        """An optimizer's per-element state: by the state's name, then the parameter's."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found.setdefault(key, {})[name] = value
        return found


class Layout:
    """Where every rank's fragments lie, so that whole parameters can be put together.

    Collective: every rank must construct it (once; the layout of a run does not change).
    """

    def __init__(self, own: Sequence[Fragment]) -> None:
        mine = [(f.name, f.start, len(f.values)) for f in own]
        self._ranks: list[list[tuple[str, int, int]]] = [mine]
        if world_size() > 1:
            everyone: list[list[tuple[str, int, int]] | None] = [None] * world_size()
            dist.all_gather_object(everyone, mine)
            self._ranks = [places or [] for places in everyone]
        self.sizes: dict[str, int] = {}
        for name, start, length in (place for places in self._ranks for place in places):
            self.sizes[name] = max(self.sizes.get(name, 0), start + length)
        self._longest = max(sum(length for _, _, length in places) for places in self._ranks)

    def gather(self, own: Sequence[Fragment]) -> dict[str, Tensor]:
        """Put every parameter together from all ranks' fragments: name -> [elements], fp32.

        Collective: every rank must call; one all-gather.
        """
        device = own[0].values.device if own else None  # offload may keep some of them elsewhere
        values = [f.values.detach().reshape(-1).to(device, torch.float32) for f in own]
        flat = torch.cat(values or [torch.empty(0)])
        whole = {name: flat.new_empty(size) for name, size in self.sizes.items()}
        for places, received in zip(self._ranks, self._exchange(flat), strict=True):
            offset = 0
            for name, start, length in places:
                whole[name][start : start + length] = received[offset : offset + length]
                offset += length
        return whole

    def _exchange(self, flat: Tensor) -> list[Tensor]:
        if world_size() == 1:
            return [flat]
        padded = torch.nn.functional.pad(flat, (0, self._longest - len(flat)))
        if dist.get_backend() == "nccl":  # offloaded parts are on the CPU
            padded = padded.cuda()
        received = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(received, padded)
        return received
