"""`hpdist report`: write the page of one or several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page of the curves of one run, or of several side by side",
        usage="hpdist report RUN [RUN ...] [--out FILE]",
        description="Write a self-contained page from the content of run folders.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", metavar="FILE", help="default: report.html, for one run in its folder"
    )


def run(known: argparse.Namespace, settings: Sequence[str] = ()) -> int:
    """Write the page of one or several runs."""
    from hpdist.tracking.report import write_report

    runs = [Path(run) for run in known.runs]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = Path(known.out) if known.out else default
    write_report(runs, out)
    print_text(str(out))
    return 0
