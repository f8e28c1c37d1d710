"""`hpdist configs`: list the configs that come with hpdist, or copy them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "configs", help="list the configs that come with hpdist, or copy them", allow_abbrev=False
    )
    parser.add_argument(
        "--copy", metavar="FOLDER", help="write configs/ and launch/ there, to launch with them"
    )


def run(known: argparse.Namespace, settings: Sequence[str] = ()) -> int:
    """List the configs that come with hpdist, or copy them."""
    from hpdist.cli.shipped import copy_shipped, list_configs

    if known.copy is None:
        print_text("\n".join(list_configs()))
        return 0
    written = copy_shipped(Path(known.copy))
    print_text(f"{len(written)} files written into configs/ and launch/ of {known.copy}")
    return 0
