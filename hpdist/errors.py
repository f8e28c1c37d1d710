"""What hpdist raises: one root, a handful of children.

A message says what is wrong, where (setting, file, rank, step) and what to do. The command line prints
it as one line and exits with `exit_status`.
"""


class HpdistError(Exception):
    """The root of every error that hpdist raises on purpose."""

    exit_status = 3


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
