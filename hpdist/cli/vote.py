"""`hpdist vote LABELS… --out DIR --epsilon E`: the private majority of several teachers' labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text

if TYPE_CHECKING:
    from hpdist.evaluate.vote import Voted


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "vote",
        help="labels that several private teachers agree on, with what they cost in privacy",
        usage="hpdist vote LABELS LABELS ... --out DIR --epsilon E [--delta D] [--rows N] ...",
        description="Write the noisy majority (GNMax) of what several teachers predicted.",
        allow_abbrev=False,
    )
    parser.add_argument("labels", nargs="+", metavar="LABELS", help="what hpdist predict wrote")
    parser.add_argument("--out", metavar="DIR", required=True, help="must be empty or new")
    parser.add_argument("--vote", choices=["gaussian"], default="gaussian", help="the noise")
    cost = parser.add_mutually_exclusive_group(required=True)
    cost.add_argument("--epsilon", type=float, metavar="E", help="of all answers")
    cost.add_argument("--sigma", type=float, metavar="S", help="the noise on each count instead")
    parser.add_argument("--delta", type=float, metavar="D", default=1e-5)
    parser.add_argument("--rows", type=int, metavar="N", help="ask for so many, by default all")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="answer rows on which so many teachers agree"
    )
    parser.add_argument(
        "--threshold-sigma", type=float, metavar="S1", help="the noise on that number"
    )
    parser.add_argument("--answers", type=int, metavar="K", help="stop after so many answers")
    parser.add_argument(
        "--accounting",
        choices=["data-independent", "data-dependent"],
        default="data-independent",
        help="data-dependent: also print what these votes cost, which is private itself",
    )


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Vote, and print what was spent."""
    from hpdist.errors import ConfigError
    from hpdist.evaluate.gnmax import Check
    from hpdist.evaluate.vote import vote

    for name in ("rows", "answers"):
        value = getattr(known, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: must be at least 1")
    if (known.threshold is None) != (known.threshold_sigma is None):
        raise ConfigError("--threshold and --threshold-sigma go together; give both or neither")
    voted = vote(
        known.labels,
        Path(known.out),
        epsilon=known.epsilon,
        sigma=known.sigma,
        delta=known.delta,
        rows=known.rows,
        answers=known.answers,
        check=None if known.threshold is None else Check(known.threshold, known.threshold_sigma),
        data_dependent=known.accounting == "data-dependent",
    )
    print_text("\n".join(_lines(voted, known.out)))
    return 0


def _lines(voted: Voted, out: str) -> list[str]:
    """Say what was answered and spent."""
    spent = voted.spent
    asked = "" if spent.threshold is None else f" of {spent.asked:,} that were asked for"
    lines = [
        f"answers: {voted.labels:,} rows{asked} by {spent.teachers} teachers in {out}",
        f"privacy: epsilon {spent.epsilon:.4g} at delta {spent.delta:g}, noise of sigma "
        f"{spent.sigma:.4g} on each count; this bound does not depend on the votes and may be "
        "published",
    ]
    if voted.dependent_epsilon is not None:
        lines.append(
            f"private: epsilon {voted.dependent_epsilon:.4g} at delta {spent.delta:g} by the votes "
            "themselves. This number is computed from private rows and tells something about them: "
            "do not publish it. Only with noise by its smooth sensitivity could it be published, "
            "which is not added here. It is written to no file"
        )
    return lines
