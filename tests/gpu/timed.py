"""Programs that have a time, after which they end with all that they have started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def run_within(
    seconds: float, command: Sequence[str], *, captured: bool = False
) -> tuple[str, str | None]:
    """Run a command from the root of the repository.

    Gives what it printed, if it is `captured`, and what went wrong, in words; None if nothing did.
    """
    print(f"$ {' '.join(command)}    # at most {seconds:.0f} s", file=sys.stderr, flush=True)
    output = subprocess.PIPE if captured else None
    with subprocess.Popen(command, cwd=ROOT, stdout=output, text=True, encoding="utf-8") as process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            out, _ = process.communicate()
            return out or "", f"it was not done after {seconds:.0f} s"
        problem = f"it ended with status {process.returncode}" if process.returncode else None
        return out or "", problem


def _kill(number: int) -> None:
    """SIGKILL to a process and all that it has started, whatever their groups and sessions."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(number)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
