"""Ends a process with its parent, which may be killed without a chance to end its children."""

from __future__ import annotations

import os
import threading
import time

_LOOK_SECONDS = 0.2  # interval of the check whether the parent lives


def end_with(parent: int) -> None:
    """Have this process end when its parent is gone, even in the middle of its work.

    The parent itself passes its process id to the child: if the child asked for it, it might
    already get that of another process that has adopted the orphan.
    """
    threading.Thread(target=_watch, args=(parent,), name="hpdist-lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
