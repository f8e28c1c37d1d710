"""The errors that hpdist raises: one base class with a few subclasses.

A message says what is wrong, where (setting, file, rank, step) and what to do. The command line
prints it as one line and exits with `exit_status`. It holds no password and no signature of a URL,
even if it includes a library's error or a setting; nor does its cause, which a traceback shows as
well.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from pathlib import Path

from hpdist.messages.redaction import redact_error, redacted_text


class HpdistError(Exception):
    """The base of every error that hpdist raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())

    exit_status = 3
    rank: int | None = None
    """The rank that raised it, if the others may not have."""
    everywhere = False
    """Whether every rank raises it, so that one may report it."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(redacted_text(p) if isinstance(p, str) else p for p in parts))
        redact_error(sys.exc_info()[1])  # the cause of this one


class ConfigError(HpdistError):
    """A setting is missing, misspelt, out of range, or clashes with another."""

    exit_status = 2


class DataError(HpdistError):
    """A dataset, split, column, row or label is not what the config says."""

    exit_status = 2


class CheckpointError(HpdistError):
    """A checkpoint or run folder cannot be read, written or continued from."""

    exit_status = 2


class PrecisionError(HpdistError):
    """Training left the range of the number format: overflow without end, or NaN."""


class DistributedError(HpdistError):
    """The ranks disagree, or one of them failed."""


class DivergenceError(HpdistError):
    """Training failed without an error of its own: NaN, or collapsed pseudo-labels."""


class RehearsalError(HpdistError):
    """The memory of a rank could not be counted here."""


class StoppedError(HpdistError):
    """A signal asked the run to stop; it is saved and can continue."""

    exit_status = 4


def printable(text: str, most: int | None = None) -> str:
    """Remove control characters, which a terminal would execute; truncate long texts.

    Names of classes, columns and files may come from strangers.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def one_line(error: BaseException) -> str:
    """Take the innermost explicit cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def why_not_written(error: Exception, folder: Path) -> str:
    """Why nothing could be written to a folder; the system does not name a lack of inodes."""
    text = str(error)
    if "No space left" in text and hasattr(os, "statvfs"):
        while not folder.exists():
            folder = folder.parent
        disk = os.statvfs(folder)
        if disk.f_files > 0 and disk.f_favail == 0:  # some file systems have no limit
            return f"{text} ({folder} has no free inodes; remove files, however small)"
    return text


def describe(error: BaseException) -> str:
    """Describe an error in a user's code on one line: `TypeError: … (models.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_THEIRS)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


_NOT_THEIRS = (
    "<",  # <frozen importlib…>
    str(Path(__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib")),
)
