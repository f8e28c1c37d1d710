"""A checkpoint as many ranks write it, written by their own writers one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from hpdist.checkpoint.manifest import folder_name
from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.distributed.fragments import Fragment, Partition

Fragments = Mapping[str, Sequence[Fragment]]
KINDS = ("master", "optimizer.exp_avg", "optimizer.exp_avg_sq", "teacher")


def save_on(folder: Path, ranks: int, of_rank: Callable[[int], Fragments], step: int = 1) -> Path:
    """Save what each rank has; its folder. The first rank saves last, as it waits for the rest."""
    first = CheckpointWriter(folder, 0, ranks, keep=2, background=False)  # it clears the folder
    for rank in [*range(1, ranks), 0]:
        writer = CheckpointWriter(folder, rank, ranks, keep=2, background=False) if rank else first
        writer._token = first._token  # as all are told
        writer.save(step, of_rank(rank), {"count": torch.tensor(step)}, {})
        assert writer.problems() == []
    return folder / folder_name(step)


def weights(tensors: int, elements: int) -> dict[str, torch.Tensor]:
    """Tensors of different sizes; element i of all of them is i."""
    sizes = [elements + 37 * number for number in range(tensors)]
    whole = torch.arange(sum(sizes), dtype=torch.float32)
    parts = whole.split(sizes)
    return {f"layers.{number}.weight": part for number, part in enumerate(parts)}


def cut_flat(tensors: Mapping[str, torch.Tensor], ranks: int) -> Callable[[int], Fragments]:
    """Cut as DDP, ZeRO-1 and ZeRO-2 are: all tensors in a row, in equal shares."""
    return lambda rank: dict.fromkeys(KINDS, Partition(tensors, rank, ranks).cut(tensors))


def cut_each(tensors: Mapping[str, torch.Tensor], ranks: int) -> Callable[[int], Fragments]:
    """Cut as ZeRO-3 is: each tensor in equal shares, of which the last ones may be empty."""

    def of_rank(rank: int) -> Fragments:
        pieces = []
        for name, tensor in tensors.items():
            share = -(-len(tensor) // ranks)
            start = min(rank * share, len(tensor))
            pieces.append(Fragment(name, start, tensor[start : start + share]))
        return dict.fromkeys(KINDS, pieces)

    return of_rank
