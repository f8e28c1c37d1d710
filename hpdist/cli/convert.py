"""`hpdist convert`: write the unlabelled rows of a config as Parquet."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.arguments import load_config
from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text
from hpdist.errors import ConfigError

OWN_OPTIONS = ("--help", "--out")
"""Options of the command; every other one is a setting of the config."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "convert",
        help="write a config's unlabelled rows as Parquet that a stream reads from any place",
        usage="hpdist convert CONFIG --out FOLDER [--key.sub value ...]",
        description="Read data.unlabeled of CONFIG once and write it as Parquet files into FOLDER.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="made if it does not exist")


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Write the unlabelled rows of a config as Parquet, and print how to read them."""
    from tqdm import tqdm

    from hpdist.data.convert import convert as write

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("convert runs on one process; start it without a launcher")
    data = load_config(known.config, settings, run_code=False).data
    if data.unlabeled is None or not data.unlabeled.path:
        raise ConfigError("convert reads the dataset that data.unlabeled.path names; set it")
    with tqdm(unit=" rows", dynamic_ncols=True, disable=None) as bar:
        written = write(
            data.unlabeled,
            Path(known.out),
            input=data.labeled.input,
            loading=data.loading,
            bar=bar,
        )
    print_text(
        f"# rows: {written.rows:,}, row groups: {written.groups:,}, files: {len(written.files)}, "
        f"together {written.bytes / 1e6:,.1f} MB\n"
        "# In place of path, name, data_files, revision, split and input:\n"
        f"{written.yaml().rstrip()}"
    )
    return 0
