"""Run a function on N real gloo ranks, each a process of its own.

They are forked from a server that has done the imports, which take longer than most tests; nothing
else has happened there.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

_NO_MESSAGE = (
    "no rank has raised an error; if one could not even start, see its stderr (the "
    "function must be importable by its module's name)"
)


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 300,
    start: str = "forkserver",
    preload: Sequence[str] = ("hpdist.train.trainer",),
) -> list[Any]:
    """Call a function on every rank of a launched job, and return the results in rank order.

        losses = run_ranks(train_two_steps, 4, "fixmatch")

    The ranks have the environment of `accelerate launch` (RANK, WORLD_SIZE, MASTER_ADDR and so
    on), each with one thread and no GPU of its own; `Accelerator()` joins them by gloo if there is
    no GPU.

    Args:
        function: A function at the top level of a module, or anything else that can be pickled.
        ranks: The number of processes.
        args: The function's arguments, the same on every rank; they are pickled.
        timeout: Seconds after which all ranks are killed.
        start: "forkserver" forks the ranks from a server that has done the imports; "spawn" starts
        a new interpreter for each.
        preload: Modules for that server to import; only the first call in a process decides.

    Raises RankError, with the traceback of the rank that failed first, if one fails or does not end
    in time. No rank is left behind.
    """
    if start == "forkserver":
        multiprocessing.set_forkserver_preload(list(preload))
    with tempfile.TemporaryDirectory() as folder:
        here = (os.getcwd(), dict(os.environ))
        context = start_processes(
            _main,
            args=(ranks, free_port(), folder, here, function, args),
            nprocs=ranks,
            join=False,
            start_method=start,
        )
        try:
            deadline = time.monotonic() + timeout
            while not context.join(max(deadline - time.monotonic(), 0)):  # one rank has ended
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{ranks} ranks did not finish within {timeout:g} s")
        except BaseException as error:
            for process in context.processes:
                process.kill()
            for process in context.processes:
                process.join()
            if not isinstance(error, Exception):  # such as KeyboardInterrupt
                raise
            first = _first_error(folder)
            if not isinstance(error, ProcessRaisedException):  # such as killed, or too slow
                first = f"a rank failed: {error}\n{first or _NO_MESSAGE}"
            raise RankError(first) from error
        return [
            torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(ranks)
        ]


class RankError(AssertionError):
    """A rank failed, or did not end in time."""


def free_port() -> int:
    """Return a free port below those that systems use for outgoing connections.

    One of theirs could be taken by any connection before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _main(
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    here: tuple[str, dict[str, str]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # imported modules are no garbage; ZeRO-3 would scan them each time
    torch.set_num_threads(1)
    os.chdir(here[0])  # the server keeps the folder of its start
    os.environ.clear()
    os.environ.update(here[1])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        result = function(*args)
    except BaseException:
        text = f"a rank failed: rank {rank} of {ranks}\n{traceback.format_exc()}"
        Path(folder, f"error-{time.time_ns():024}-{rank}").write_text(text)
        raise
    torch.save(result, Path(folder, f"result-{rank}"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _first_error(folder: str) -> str:
    """Return the error of the rank that failed first; others may have failed as a result."""
    errors = sorted(Path(folder).glob("error-*"))
    if not errors:
        return ""
    first, *others = errors
    failed = sorted(int(path.name.rsplit("-", 1)[1]) for path in others)
    note = f"(later rank {', '.join(map(str, failed))} failed too)\n" if failed else ""
    return first.read_text() + note
