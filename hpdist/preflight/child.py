"""A process beside each process that met, which joins a process group of its own.

NCCL waits for ever for a process that it cannot reach, and ends its own process on errors. So what
needs a group of GPUs runs beside: it is killed when the time is up, and the check goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpdist.distributed.rendezvous import TOKEN, Endpoint
from hpdist.distributed.shared_store import SharedStore
from hpdist.processes import end_with

_QUOTED = 3  # warnings of NCCL


def run_in_child(
    module: str,
    backend: str,
    device: str,
    endpoint: Endpoint,
    seconds: float,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any] | str:
    """Run a module as a program beside this process; return its result, or why there is none.

    The module calls `join_and_print`. Collective: every process that met must call.
    """
    command = [sys.executable, "-m", module, backend, device, endpoint.address]
    command += [str(endpoint.port), str(endpoint.rank), str(endpoint.size), str(seconds)]
    command += [str(os.getpid()), *arguments]
    environment = {"NCCL_DEBUG": "WARN", **os.environ, **(variables or {}), TOKEN: endpoint.token}
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
        if line.startswith('{"result"'):
            found: dict[str, Any] = json.loads(line)["result"]
            return found
        if line.startswith('{"error"'):
            why = json.loads(line)["error"]
    warnings = [line.partition("NCCL WARN")[2].strip() for line in lines if "NCCL WARN" in line]
    return "; ".join([why, *dict.fromkeys(warnings[:_QUOTED])])


def join_and_print(name: str, work: Callable[[torch.device, list[str]], Mapping[str, Any]]) -> None:
    """In the process beside: join the others of its kind, work, print the result, and end.

    Args:
        name: Separates this group's entries in the store from others'.
        work: Gets this process's device and the further arguments.
    """
    backend, device, address, port, rank, size, seconds, parent, *arguments = sys.argv[1:]
    end_with(int(parent))  # NCCL may wait for ever
    own = torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    printed: dict[str, Any]
    try:
        store = SharedStore(address, int(port), os.environ.get(TOKEN, ""), float(seconds))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"{name}/{backend}", store),  # type: ignore[attr-defined]
            rank=int(rank),
            world_size=int(size),
            timeout=timedelta(seconds=float(seconds)),
        )
        printed = {"result": work(own, arguments)}
    except Exception as error:  # whatever a library raises is the finding
        printed = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    print(json.dumps(printed), flush=True)
    os._exit("error" in printed)  # leaving a broken group can hang
