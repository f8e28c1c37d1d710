"""Rows of numbers from all ranks, of which each rank may have another number."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.distributed.collectives import world_size


def gathered_rows(own: Tensor) -> list[Tensor]:
    """Give every rank's rows, in rank order, on every rank; on the CPU.

    `own` is [rows, *] on the CPU, the same in all but the rows on every rank. What is received is
    as large as the rows of all ranks, each padded to the longest. Collective: every rank must call.
    """
    if world_size() == 1:
        return [own]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # some groups have NCCL alone
    count = torch.tensor([len(own)], device=device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(one) for one in counts]
    padded = torch.zeros(max(1, *sizes), *own.shape[1:], dtype=own.dtype, device=device)
    padded[: len(own)] = own.to(device)
    received = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return [rows[:size].cpu() for rows, size in zip(received, sizes, strict=True)]
