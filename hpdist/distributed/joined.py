"""The process group of a command that does not train: launched ranks that share its rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from hpdist.distributed.collectives import leave_group, world_size
from hpdist.distributed.launcher_watch import LauncherWatch
from hpdist.distributed.mpi import adopt_mpi
from hpdist.errors import DistributedError

_TIMEOUT = timedelta(hours=2)  # ranks may have unequal work before they meet


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Inside, the processes that a launcher has started are one group; alone, there is none.

    A process whose launcher is killed ends at once: what the command writes is whole or not there.
    Collective. Raises DistributedError where the ranks cannot meet.
    """
    adopt_mpi()
    watch = LauncherWatch(int(os.environ.get("RANK", "0")), grace=0)
    try:
        with _group():
            yield
    finally:
        watch.stop()


@contextmanager
def _group() -> Iterator[None]:
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched or world_size() > 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"the ranks cannot meet: {' '.join(str(error).split())}") from error
    yield
    leave_group()


def own_place() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    ranks = world_size()
    return (dist.get_rank() if ranks > 1 else 0), ranks
