"""Ends a process with its parent, which may be killed without a chance to end its children."""

from __future__ import annotations

import os
import threading
import time

_LOOK_SECONDS = 0.2  # how often a process looks whether its parent lives


def end_with(parent: int) -> None:
    """Have this process end when its parent is gone, even in the middle of its work.

    A child is given the parent's process id by the parent itself: one that is asked for by the
    child may already be that of another process, which took the orphan over.
    """
    threading.Thread(target=_watch, args=(parent,), name="hpdist-lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
