"""`hpdist algorithms`: list the algorithms."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text


def add_arguments(commands: Commands) -> None:
    """Describe the command."""
    commands.add_parser("algorithms", help="list every algorithm", allow_abbrev=False)


def run(known: argparse.Namespace, settings: Sequence[str] = ()) -> int:
    """List the algorithms."""
    from hpdist.algorithms.catalogue import catalogue

    for line in catalogue():
        print_text(line)
    return 0
