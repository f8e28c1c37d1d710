"""Real ranks made by forking, which start at once: for tests that kill many of them.

The parent must not have used threads of torch before. What it has imported they have, too: call
from a warm rank (tests/support/ranks.py), since DeepSpeed's imports take longer than most runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port


def run_forked(
    ranks: int,
    log: Path,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 120,
    **settings: Any,
) -> list[int]:
    """Call a function on every rank; how each ended: 0, or minus the signal, or its status.

    Once one is killed by a signal, the others have two seconds before they are, too.
    """
    port = free_port()
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os._exit(_rank(rank, ranks, port, log, partial(function, *args, **settings)))
        children[child] = rank
    ended: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < ranks:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done in children:
            ended[children[done]] = os.waitstatus_to_exitcode(status)
            if ended[children[done]] != 0:
                deadline = min(deadline, time.monotonic() + 2)
        elif time.monotonic() > deadline:
            for child, rank in children.items():
                if rank not in ended:
                    os.kill(child, signal.SIGKILL)
            deadline += 60
        else:
            time.sleep(0.01)
    return [ended[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, log: Path, function: Callable[[], Any]) -> int:
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        HPDIST_ALLOW_CPU_FP16="1",
    )
    try:
        function()
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        return int(getattr(error, "exit_status", 1))
    return 0
