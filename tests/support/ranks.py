"""Run a function on N real gloo ranks, each a process of its own.

They are warm (tests/support/warm_ranks.py), unless a test asks for interpreters of their own.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.support.warm_ranks import RANKS, start_method


def free_port() -> int:
    """A port that nobody listens at, below those that systems give to outgoing connections.

    One of theirs could be taken by any connection before the one who asked for it listens.
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
    gc.freeze()  # what is imported is no garbage; ZeRO-3 would look through it each time
    torch.set_num_threads(1)
    os.chdir(here[0])  # the server is where it was started
    os.environ.clear()
    os.environ.update(here[1])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **RANKS,
    )
    try:
        result = function(*args)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise
    torch.save(result, Path(folder, f"result-{rank}"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300,
    fresh: bool = False,
) -> list[Any]:
    """Call a top-level function on every rank; results in rank order. A failing rank fails all.

    `fresh` ranks have an interpreter of their own: where a test measures their memory, or captures
    what they print, which the server's ranks print where it was started.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _main,
            args=(ranks, free_port(), folder, (os.getcwd(), dict(os.environ)), function, args),
            nprocs=ranks,
            join=False,
            start_method=start_method(fresh),
        )
        try:
            deadline = time.monotonic() + timeout
            while not context.join(max(deadline - time.monotonic(), 0)):  # one rank has ended
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{ranks} ranks did not finish within {timeout} s")
        except BaseException as error:
            for process in context.processes:
                process.kill()
            errors = "\n".join(p.read_text() for p in sorted(Path(folder).glob("error-*")))
            raise AssertionError(f"a rank failed: {error}\n{errors}") from error
        return [
            torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(ranks)
        ]
