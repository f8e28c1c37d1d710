"""The speed between processes: latency and bandwidth of an all-reduce.

Run as a program by `measure_in_process`, it is one process of a separate group.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from hpdist.distributed.rendezvous import Endpoint
from hpdist.preflight.child import join_and_print, run_in_child

_LONG_ENOUGH = 0.5  # seconds, after which no larger all-reduce is tried
_LARGEST = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes of an all-reduce
_TRIES = {"cpu": 1, "cuda": 3}  # the best counts; the first on a GPU includes setup


@dataclass(frozen=True)
class Speed:
    """The cost of an all-reduce."""

    latency: float
    """Seconds for 4 bytes."""
    size: int
    """Bytes of the large one."""
    seconds: float
    """For the large one."""
    processes: int

    def __str__(self) -> str:
        sent = 2 * (self.processes - 1) / self.processes * self.size  # by each process
        return (
            f"{1e3 * self.latency:.2f} ms for 4 bytes; {self.size >> 20} MiB in "
            f"{self.seconds:.3g} s, {8 * sent / self.seconds / 1e9:.3g} Gbit/s sent by each"
        )


def measure(group: dist.ProcessGroup | None, device: torch.device) -> Speed:
    """Measure a small all-reduce and one that takes a while, of tensors on the device.

    Collective: every process of the group must call.
    """
    latency = min(_all_reduce(1, group, device) for _ in range(20))
    size = 1 << 20
    while True:
        taken = min(_all_reduce(size // 4, group, device) for _ in range(_TRIES[device.type]))
        slowest = torch.tensor([taken], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        seconds = slowest.item()
        if seconds > _LONG_ENOUGH or size >= _LARGEST[device.type]:
            return Speed(latency, size, seconds, dist.get_world_size(group))
        size *= 8 if 8 * size <= _LARGEST[device.type] else 4


def _all_reduce(numbers: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Seconds of an all-reduce that all begin together."""
    values = torch.zeros(numbers, device=device)
    together = torch.zeros(1, device=device)
    dist.all_reduce(together, group=group)
    together.item()  # waits for the device
    start = time.perf_counter()
    dist.all_reduce(values, group=group)
    values[0].item()
    return time.perf_counter() - start


def measure_in_process(
    backend: str, device: str, endpoint: Endpoint, seconds: float
) -> Speed | str:
    """Measure in a separate process beside each process that met, or return why it failed.

    Collective: every process that met must call.
    """
    found = run_in_child("hpdist.preflight.network", backend, device, endpoint, seconds)
    return found if isinstance(found, str) else Speed(**found)


if __name__ == "__main__":
    join_and_print("measure", lambda device, _: asdict(measure(None, device)))
