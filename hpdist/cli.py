"""The command line: `hpdist train CONFIG [--key.sub value ...]`, alone or under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpdist import __version__
from hpdist.errors import ConfigError, HpdistError

_MAIN_RANK = os.environ.get("RANK", "0") == "0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.command == "train":
            return train(known, rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return algorithms()
    except HpdistError as error:
        if _MAIN_RANK:
            print(f"hpdist: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status


def train(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train as a config says."""
    from hpdist import config as configuration

    if known.print_schema:
        print(configuration.json_schema()) if _MAIN_RANK else None
        return 0
    if known.config is None or known.config.startswith("--"):
        raise ConfigError("train needs a config file: hpdist train CONFIG [--key.sub value ...]")
    config = configuration.load(known.config, overrides)
    if known.print_config:
        print(config.to_yaml(), end="") if _MAIN_RANK else None
        return 0
    from hpdist.trainer import Trainer

    trainer = Trainer.from_config(config, files=not known.dry_run)
    if known.dry_run:
        trainer.dry_run()
    else:
        summary = trainer.fit()
        if trainer.main:
            _print_summary(summary, Path(config.run.folder))
    trainer.accelerator.end_training()
    return 0


def algorithms() -> int:
    """List the algorithms."""
    from hpdist.algorithms import catalogue

    for line in catalogue():
        print(line)
    return 0


def _print_summary(summary: dict[str, object], folder: Path) -> None:
    for key, value in summary.items():
        text = f"{value:.4f}" if isinstance(value, float) and "/" in key else str(value)
        print(f"{key:24} {text}")
    print(f"{'run folder':24} {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpdist",
        description="Half-precision, sharded semi-supervised training.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hpdist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "train",
        help="train as a config says; continues by itself where a checkpoint is",
        description="Train as CONFIG (YAML) says. Any setting can be overridden: --optim.lr 0.1",
        allow_abbrev=False,
    )
    run.add_argument("config", nargs="?", help="YAML file")
    run.add_argument("--dry-run", action="store_true", help="build everything, one step, no files")
    run.add_argument("--print-config", action="store_true", help="print the resolved YAML and stop")
    run.add_argument("--print-schema", action="store_true", help="print the JSON Schema and stop")
    commands.add_parser("algorithms", help="list every algorithm", allow_abbrev=False)
    return parser
