"""The program that `python -m hpdist.data.samples.NAME FOLDER` is, whatever it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from hpdist.errors import HpdistError


def write_samples(name: str, arguments: list[str], *writers: Callable[[str], Path]) -> int:
    """Have each writer write into the folder, and print what it gives; returns the exit status."""
    if len(arguments) != 1:
        print(f"usage: python -m hpdist.data.samples.{name} FOLDER", file=sys.stderr)
        return 2
    try:
        for write in writers:
            print(write(arguments[0]))
    except HpdistError as error:
        print(f"hpdist: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    return 0
