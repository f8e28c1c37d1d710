"""`hpdist train`: train by a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpdist.cli.arguments import load_config
from hpdist.cli.commands import Commands
from hpdist.cli.output import begin_warnings, own_rank, print_text
from hpdist.errors import CheckpointError, ConfigError, DataError, DistributedError

if TYPE_CHECKING:
    from hpdist.train.trainer import Trainer


OWN_OPTIONS = ("--help", "--dry-run", "--print-config", "--print-schema")
"""Options of the command; every other one is a setting of the config."""


_OVERRIDES = """\
Any setting of CONFIG can be overridden by its dotted name, and the command line wins:

  hpdist train configs/digits.yaml --algorithm.name freematch --optim.lr 0.01
  hpdist train configs/digits.yaml --batch.unlabeled=112 --views.mean "[0.5]" --zero.stage null

Values are read as YAML. Another name for the model, the algorithm or the views drops the old one's
options in the file. --print-config shows the result, --print-schema every setting that
exists."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "train",
        help="train by a config; continues from its latest checkpoint",
        usage="hpdist train CONFIG [--key.sub value ...] [--dry-run | --print-config]",
        description="Train by CONFIG, and continue if its run folder holds a checkpoint.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file, or a name that hpdist configs lists"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, one step, no files"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved YAML and stop"
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema and stop"
    )


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Train by a config."""
    from hpdist.train import config as configuration

    if known.print_schema:
        print_text(configuration.json_schema())
        return 0
    if known.config is None:
        raise ConfigError("train needs a config file: hpdist train CONFIG [--key.sub value ...]")
    if known.print_config:
        config = load_config(known.config, settings, run_code=False)
        print_text(config.to_yaml().rstrip())
        return 0
    config = load_config(known.config, settings)
    from hpdist.cli.closing import summary_lines
    from hpdist.distributed.collectives import leave_group
    from hpdist.train.trainer import Trainer

    begin_warnings()
    trainer = Trainer.from_config(config, files=not known.dry_run)
    summary = _fit(trainer, known.dry_run)
    for line in summary_lines(summary, config.run.folder):
        print_text(line)
    leave_group()
    return 0


def _fit(trainer: Trainer, dry_run: bool) -> dict[str, object]:
    try:
        if not dry_run:
            return trainer.fit()
        trainer.dry_run()
        return {}
    except (CheckpointError, DataError, DistributedError) as error:
        if not error.everywhere:
            error.rank = own_rank()  # the others may not have this error
        raise
