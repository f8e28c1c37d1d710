"""The interface of a command: a module that describes its arguments and runs."""

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

    A module with `OWN_OPTIONS`, the names of its options, also takes a config's settings.
    """

    def add_arguments(self, commands: Commands) -> None:
        """Describe the command's arguments."""
        ...

    def run(self, known: argparse.Namespace, settings: Sequence[str]) -> int:
        """Run it; returns the exit status."""
        ...
