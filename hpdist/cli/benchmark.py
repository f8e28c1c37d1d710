"""`hpdist benchmark`: score, latency and bytes of a model in several formats and precisions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.commands import Commands
from hpdist.cli.evaluate import test_settings
from hpdist.cli.output import begin_warnings, print_text
from hpdist.errors import ConfigError

OWN_OPTIONS = ("--help", "--precision", "--batch", "--device", "--data", "--out")
"""Options of the command; `--data.test.…` are settings of the set that is measured on."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "benchmark",
        help="score, latency and bytes of runs and exported files on this device, with a plot",
        usage=(
            "hpdist benchmark MODEL [MODEL ...] [--data DATA] [--precision fp32,bf16,fp16] "
            "[--batch ROWS] [--out FILE] [--data.test.key value ...]"
        ),
        description=(
            "Measure each MODEL on DATA, or on the first one's test set; a run is measured in all "
            "the precisions, an exported file in its own."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="run folder, its model/, or an exported file"
    )
    parser.add_argument("--data", metavar="DATA", help="a path of labelled rows")
    parser.add_argument(
        "--precision", default="fp32,bf16,fp16", help="separated by commas (default: all three)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="default: 1")
    parser.add_argument("--device", help="of torch; default: this process's GPU, else the CPU")
    parser.add_argument(
        "--out",
        default="benchmark.png",
        metavar="FILE",
        help="the plot; the numbers go beside it, as .json (default: benchmark.png)",
    )


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Measure all models, print the table, and write the plot and the numbers."""
    from hpdist.evaluate.benchmark import Candidate, benchmark, table
    from hpdist.evaluate.benchmark_plot import draw, require_plot
    from hpdist.evaluate.load import load
    from hpdist.evaluate.measure import open_measured
    from hpdist.evaluate.precisions import parse_precisions, write_report

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("benchmark runs in one process; start it without accelerate launch")
    if known.batch < 1:
        raise ConfigError(f"--batch: {known.batch} must be at least 1")
    out = Path(known.out)
    if out.suffix != ".png":
        raise ConfigError(f"--out: the name of the plot must end in .png, not in {out.name!r}")
    wanted, overrides = parse_precisions(known.precision), test_settings(settings, "benchmark")
    require_plot()
    begin_warnings()
    candidates = []
    for name in known.models:
        loaded = load(name, device=None if Path(name).is_file() else known.device)
        if loaded.backend is not None or Path(name).is_file():
            candidates.append(Candidate(name, loaded))
        else:
            candidates += [Candidate(name, loaded.with_precision(each)) for each in wanted]
    first = candidates[0].predictor
    rows = open_measured(first, known.data, overrides)
    found = benchmark(candidates, rows, known.batch)
    print_text(table(found, first.task.in_percent))
    draw(found, out)
    numbers = out.with_suffix(".json")
    write_report({"data": rows.name, "results": [one.to_json() for one in found]}, numbers)
    print_text(f"written to {out} and {numbers}")
    return 0
