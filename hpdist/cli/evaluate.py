"""`hpdist evaluate`: measure a trained model in several precisions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdist.cli.commands import Commands
from hpdist.cli.output import begin_warnings, own_rank, print_text
from hpdist.errors import ConfigError, HpdistError

OWN_OPTIONS = (
    *("--help", "--precision", "--which", "--checkpoint", "--out", "--batch", "--device"),
)
"""Options of the command; `--data.test.…` are settings of the set that is measured on."""

_TEST = "data.test."


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a trained model in several precisions: scores, agreement, seconds, bytes",
        usage=(
            "hpdist evaluate MODEL [DATA] [--precision fp32,bf16,fp16] [--which teacher|student] "
            "[--data.test.key value ...]"
        ),
        description=(
            "Measure MODEL on DATA, or on the run's test set, on any number of launched ranks, and "
            "write evaluation.json into the run folder."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="run folder, its model/, a checkpoint, or an exported file",
    )
    parser.add_argument("data", nargs="?", metavar="DATA", help="a path of labelled rows")
    parser.add_argument(
        "--precision", default="fp32,bf16,fp16", help="separated by commas (default: all three)"
    )
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--checkpoint", metavar="STEP", help="best, last, or a step")
    parser.add_argument("--out", metavar="FILE", help="default: evaluation.json in the run folder")
    parser.add_argument("--batch", type=int, metavar="ROWS", help="rows per device per forward")
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Measure a trained model, print the table and write the report."""
    from hpdist.distributed.collectives import call_on_all_ranks, run_on_main, world_size
    from hpdist.distributed.joined import joined_ranks
    from hpdist.evaluate import precisions
    from hpdist.evaluate.load import load
    from hpdist.evaluate.measure import measure, open_measured

    wanted = precisions.parse_precisions(known.precision)
    overrides = test_settings(settings, "evaluate")
    if known.batch is not None and known.batch < 1:
        raise ConfigError(f"--batch: {known.batch} must be at least 1")
    begin_warnings()
    with joined_ranks():
        loaded = call_on_all_ranks(
            lambda: load(known.model, known.which, step_of(known.checkpoint), device=known.device)
        )
        rows = call_on_all_ranks(lambda: open_measured(loaded, known.data, overrides))
        models = precisions.in_precisions(loaded, wanted)
        found = _on_each(lambda: measure(models, rows, known.batch))
        shown = [one for one in found if one.precision in wanted] or found
        print_text(
            precisions.summary_line(loaded, shown[0].rows, sum(one.seconds for one in found))
        )
        print_text(precisions.table(shown, loaded.task.in_percent))
        place = precisions.place_of(Path(known.model), known.out)
        if place is not None:
            values = precisions.report(loaded, shown, rows.name, world_size=world_size())
            run_on_main(lambda: precisions.write_report(values, place))
            print_text(f"written to {place}")
    return 0


def _on_each(function: Any) -> Any:
    try:
        return function()
    except HpdistError as error:
        if not error.everywhere:
            error.rank = own_rank()
        raise


def step_of(text: str | None) -> Any:
    """Read the option `--checkpoint`: best, last, or a step. Raises ConfigError."""
    if text is None or text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--checkpoint: {text!r} is neither best, last nor a step")
    return int(text)


def test_settings(settings: Sequence[str], command: str) -> Mapping[str, Any]:
    """Read the settings of the set that is measured on. Raises ConfigError for any other one."""
    from hpdist.config.overrides import lay_over, read_overrides

    pairs = read_overrides(settings)
    for key, _ in pairs:
        if not key.startswith(_TEST):
            raise ConfigError(
                f"--{key}: {command} takes settings of the set that it measures on alone, "
                f"--{_TEST}path and the like; what the model was trained with is in its folder"
            )
    values: dict[str, Any] = {}
    lay_over(values, pairs)
    test: Mapping[str, Any] = values.get("data", {}).get("test", {})
    return test
