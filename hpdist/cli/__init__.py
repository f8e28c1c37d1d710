"""The commands, one small file each; `main` runs the one that the arguments name."""

from hpdist.cli.program import main

__all__ = ["main"]
