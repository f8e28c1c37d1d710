"""What a command is: a module that describes its arguments and runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Any]
else:
    Commands = object


class Command(Protocol):
    """A module of this folder.

    One that has `SETTINGS_BESIDE`, names of its own options, takes a config's settings besides.
    """

    def add_arguments(self, commands: Commands) -> None:
        """Describe the command's arguments."""
        ...

    def run(self, known: argparse.Namespace, settings: Sequence[str]) -> int:
        """Do it; returns the exit status."""
        ...
