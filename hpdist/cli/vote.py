"""`hpdist vote LABELS… --out DIR --epsilon E`: the private majority of several teachers' labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "vote",
        help="labels that several private teachers agree on, with what they cost in privacy",
        usage="hpdist vote LABELS LABELS ... --out DIR --epsilon E [--delta D] [--rows N]",
        description="Write the noisy majority (GNMax) of what several teachers predicted.",
        allow_abbrev=False,
    )
    parser.add_argument("labels", nargs="+", metavar="LABELS", help="what hpdist predict wrote")
    parser.add_argument("--out", metavar="DIR", required=True, help="must be empty or new")
    parser.add_argument("--vote", choices=["gaussian"], default="gaussian", help="the noise")
    parser.add_argument("--epsilon", type=float, metavar="E", required=True, help="of all answers")
    parser.add_argument("--delta", type=float, metavar="D", default=1e-5)
    parser.add_argument("--rows", type=int, metavar="N", help="answer so many rows, by default all")


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Vote, and print what was spent."""
    from hpdist.errors import ConfigError
    from hpdist.evaluate.vote import vote

    if known.rows is not None and known.rows < 1:
        raise ConfigError("--rows: must be at least 1")
    spent = vote(
        known.labels, Path(known.out), epsilon=known.epsilon, delta=known.delta, rows=known.rows
    )
    print_text(
        f"answers: {spent.answers:,} rows by {spent.teachers} teachers in {known.out}\n"
        f"privacy: epsilon {spent.epsilon:g} at delta {spent.delta:g}, noise of sigma "
        f"{spent.sigma:.4g} on each count"
    )
    return 0
