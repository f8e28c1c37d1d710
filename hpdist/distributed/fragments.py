"""The elements of each parameter that a rank owns: common to DDP and every ZeRO stage.

A fragment is a range of one parameter's elements, in row-major order. Teacher and checkpoints use
only fragments, so neither depends on how an engine shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.collectives import call_on_all_ranks, gathered, world_size

SpanOf = tuple[str, int, int]  # a parameter's name, a fragment's start and length
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed
_PIECE = 1 << 22  # elements of all ranks that are exchanged at once


@dataclass(frozen=True)
class Fragment:
    """`values` are elements `start` to `start + len(values)` of the parameter called `name`."""

    name: str
    start: int
    values: Tensor  # [elements], fp32 (of algorithms int too), a live view if possible

    def like(self, values: Tensor) -> Fragment:
        """Return a fragment at this place with other values."""
        return Fragment(self.name, self.start, values)


class Elements(Protocol):
    """Flat fp32 tensors by name that can be read in parts, such as those of a checkpoint."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements from `start` to `stop` of a name, [stop - start]."""
        ...


class WholeTensors:
    """`Elements` of flat tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A view of some elements."""
        return self._tensors[name][start:stop]


def real(tensor: Tensor) -> Tensor:
    """The tensor itself, or a live real view of a complex one, [*, 2]."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flat_view(tensor: Tensor) -> Tensor:
    """All numbers of a contiguous tensor as one dimension, live; complex ones as pairs."""
    return real(tensor.detach()).view(-1)


def partition(sizes: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Split concatenated tensors of these sizes into `ranks` equal parts; return part `rank`.

    Returns (index, start, stop) for each tensor that the part overlaps.
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
    """Equal shares of tensors that are whole on every rank; each rank takes its own."""

    def __init__(self, tensors: Mapping[str, Tensor], rank: int, ranks: int) -> None:
        self._names = list(tensors)
        self._sizes = [real(t).numel() for t in tensors.values()]
        self._ranks = ranks
        self._pieces = partition(self._sizes, rank, ranks)

    def cut(self, tensors: Mapping[str, Tensor]) -> list[Fragment]:
        """Views of this rank's share of tensors of the same names and sizes."""
        pieces = []
        for index, start, stop in self._pieces:
            name = self._names[index]
            if name in tensors:
                pieces.append(Fragment(name, start, flat_view(tensors[name])[start:stop]))
        return pieces

    def fill(self, tensors: Mapping[str, Tensor], read: Callable[[Fragment], Tensor]) -> None:
        """Fill tensors of the same names and sizes: each rank reads its share, and all exchange.

        What is not fp32, which an exchange would round, each rank reads whole. Collective: every
        rank must call; an HpdistError of one is raised on all.
        """
        exchanged = {n: t for n, t in tensors.items() if real(t).dtype == torch.float32}
        own = self.cut(exchanged)
        others = {name: t for name, t in tensors.items() if name not in exchanged}

        def read_own() -> None:
            for fragment in (*own, *self.uncut(others)):
                fragment.values.copy_(read(fragment))

        call_on_all_ranks(read_own)  # or the rest would wait for one that cannot read
        device = next((tensor.device for tensor in exchanged.values()), None)
        Layout(own, self._spans(exchanged)).gather_into(own, exchanged, device)

    def _spans(self, names: Container[str]) -> list[list[SpanOf]]:
        """Every rank's share of the tensors of some names."""
        return [
            [
                (self._names[index], start, stop - start)
                for index, start, stop in partition(self._sizes, rank, self._ranks)
                if self._names[index] in names
            ]
            for rank in range(self._ranks)
        ]

    def named(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """Make fragments of the values of a whole part."""
        return [
            Fragment(self._names[index], start, values)
            for (index, start, _), values in zip(self._pieces, parts, strict=True)
        ]

    @staticmethod
    def uncut(tensors: Mapping[str, Tensor]) -> list[Fragment]:
        """Views of whole tensors as fragments."""
        return [Fragment(name, 0, flat_view(tensor)) for name, tensor in tensors.items()]


class Layout:
    """The layout of every rank's fragments, from which whole parameters are assembled.

    Collective, unless `spans` is given: every rank must construct it once, as the layout of a run
    does not change.

    Args:
        own: This rank's fragments.
        spans: Name, start and length of every rank's fragments; by default they are gathered.
    """

    def __init__(
        self, own: Sequence[Fragment], spans: Sequence[Sequence[SpanOf]] | None = None
    ) -> None:
        self._ranks = [list(each) for each in spans or gathered(fragment_spans(own))]
        self.sizes: dict[str, int] = {}
        for name, start, length in (place for spans in self._ranks for place in spans):
            self.sizes[name] = max(self.sizes.get(name, 0), start + length)
        lengths = [[length for _, _, length in each] for each in self._ranks]
        self._ends = [list(accumulate(each)) for each in lengths]
        self._longest = max(sum(each) for each in lengths)

    def gather(self, own: Sequence[Fragment]) -> dict[str, Tensor]:
        """Assemble every parameter from all ranks' fragments: name -> [elements], fp32.

        Collective: every rank must call; an all-gather for every 4 million elements.
        """
        device = _device_of(own)
        whole = {name: torch.empty(size, device=device) for name, size in self.sizes.items()}
        self.gather_into(own, whole)
        return whole

    @torch.no_grad()
    def gather_into(
        self,
        own: Sequence[Fragment],
        whole: Mapping[str, Tensor] | None,
        device: torch.device | None = None,
    ) -> None:
        """Copy all ranks' fragments into whole tensors of any dtype, which are contiguous.

        A rank that gives None sends its fragments to the others and keeps nothing. Works piece by
        piece, so that little extra memory is needed, on `device`, by default that of the first
        fragment. Collective: every rank must call; an all-gather for every 4 million elements.
        """
        device = device or _device_of(own)
        flats = {name: flat_view(tensor) for name, tensor in (whole or {}).items()}
        step = max(_PIECE // len(self._ranks), 1)
        for begin in range(0, self._longest, step):
            end = min(begin + step, self._longest)
            cut = _cut([f.values.detach() for f in own], begin, end)
            piece = torch.cat([values.to(device, torch.float32) for values in cut])
            received = self._exchange(piece, end - begin)
            if whole is None:
                continue
            for spans, ends, piece in zip(self._ranks, self._ends, received, strict=True):
                for number in range(bisect_right(ends, begin), len(spans)):
                    name, start, length = spans[number]
                    at = ends[number] - length  # its start among its rank's elements
                    if at >= end:
                        break
                    low, high = max(at, begin), min(ends[number], end)
                    target = flats[name][start + low - at : start + high - at]
                    target.copy_(piece[low - begin : high - begin])

    def _exchange(self, piece: Tensor, length: int) -> list[Tensor]:
        if world_size() == 1:
            return [piece]
        padded = torch.nn.functional.pad(piece, (0, length - len(piece)))
        if dist.get_backend() == "nccl":  # offloaded parts are on the CPU
            padded = padded.cuda()
        received = padded.new_empty(world_size() * length)
        _all_gather(received, padded)  # with a list of tensors the backends would make a copy
        return list(received.split(length))


def fragment_spans(fragments: Sequence[Fragment]) -> list[SpanOf]:
    """Name, start and length of each."""
    return [(f.name, f.start, len(f.values)) for f in fragments]


def _cut(values: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
    """Select a range of elements from flat tensors in a row; at least one tensor."""
    found, at = [torch.empty(0)], 0
    for each in values:
        low, high = max(begin - at, 0), min(end - at, len(each))
        if low < high:
            found.append(each[low:high])
        at += len(each)
    return found


def _device_of(fragments: Sequence[Fragment]) -> torch.device | None:
    """The device of the first fragment; offload may keep others elsewhere."""
    return fragments[0].values.device if fragments else None
