"""Output of a command, printed once on any number of ranks."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

from hpdist.errors import HpdistError
from hpdist.messages.redaction import redacted_text


def own_rank() -> int:
    """Return the rank that the launcher gave this process."""
    return int(os.environ.get("RANK", "0"))


def print_text(text: str) -> None:
    """Print to stdout, once on any number of ranks."""
    if own_rank() != 0:
        return
    try:
        print(redacted_text(text), flush=True)
    except BrokenPipeError:  # `| head` has read enough; keep Python from failing again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_error(error: HpdistError) -> bool:
    """Print an error once, or on the only rank that has it. Return whether this rank did."""
    where = ""
    if error.rank is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        where = f"rank {error.rank}: "
    if where or own_rank() == 0:
        print(f"hpdist: {where}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return True
    return False


def let_rank_0_speak() -> None:
    """Wait on the other ranks until rank 0 has printed the error and ended.

    A launcher ends all processes once one has ended, and rank 0 may reach the error later: much
    later if the ranks have not met.
    """
    from hpdist.distributed.collectives import world_size

    time.sleep(1 if world_size() > 1 else 10)


def begin_warnings() -> None:
    """Prefix a warning with its rank if there are several, and print it above the bar."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    whose = f"rank {own_rank()}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    plain, own = warnings.formatwarning, str(Path(__file__).parents[1])

    def format_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        text = plain(message, category, filename, lineno, line)
        if category is UserWarning and filename.startswith(own):
            text = f"warning: {message}\n"  # without the line of code that Python would add
        return f"{clear}{whose}{text}"

    warnings.formatwarning = format_warning
