"""The speed between processes: latency and bandwidth of an all-reduce.

Run as a program by `measure_in_process`, it is one process of a separate group.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hpdist.distributed.rendezvous import TOKEN, Endpoint
from hpdist.distributed.shared_store import SharedStore
from hpdist.processes import end_with

_LONG_ENOUGH = 0.5  # seconds, after which no larger all-reduce is tried
_LARGEST = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes of an all-reduce
_TRIES = {"cpu": 1, "cuda": 3}  # the best counts; the first on a GPU includes setup
_QUOTED = 3  # warnings of NCCL


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

    NCCL waits for ever for a process that it cannot reach, and ends its own process on errors; the
    separate process is killed when the time is up, and this one continues. Collective: every
    process that met must call.
    """
    command = [sys.executable, "-m", "hpdist.preflight.network", backend, device]
    command += [endpoint.address, str(endpoint.port), str(endpoint.rank), str(endpoint.size)]
    command += [str(seconds), str(os.getpid())]
    environment = {"NCCL_DEBUG": "WARN"} | os.environ | {TOKEN: endpoint.token}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = child.communicate(timeout=seconds)
        why = f"it ended with status {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        why = f"not done within {seconds:g} s"
    if "NCCL_DEBUG" in os.environ:  # the user wants to read it
        print(output, file=sys.stderr, end="", flush=True)
    lines = output.splitlines()
    for line in lines:
        if line.startswith('{"latency"'):
            return Speed(**json.loads(line))
        if line.startswith('{"error"'):
            why = json.loads(line)["error"]
    warnings = [line.partition("NCCL WARN")[2].strip() for line in lines if "NCCL WARN" in line]
    return "; ".join([why, *dict.fromkeys(warnings[:_QUOTED])])


def _main() -> None:
    backend, device, address, port, rank, size, seconds, parent = sys.argv[1:]
    end_with(int(parent))  # NCCL may wait for ever
    own = torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    span = timedelta(seconds=float(seconds))
    try:
        store = SharedStore(address, int(port), os.environ.get(TOKEN, ""), float(seconds))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"measure/{backend}", store),  # type: ignore[attr-defined]
            rank=int(rank),
            world_size=int(size),
            timeout=span,
        )
        result = asdict(measure(None, own))
    except (OSError, RuntimeError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(result), flush=True)
    os._exit("error" in result)  # leaving a broken group can hang


if __name__ == "__main__":
    _main()
