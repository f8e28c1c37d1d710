"""Common parts of the commands' arguments: options, and the config's settings among them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hpdist.cli.output import own_rank
from hpdist.errors import ConfigError

if TYPE_CHECKING:
    from hpdist.train.config import RunConfig


class Parser(argparse.ArgumentParser):
    """Reports errors like every other error in the user's input."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of argparse's own exit."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def load_config(given: str, settings: Sequence[str], *, run_code: bool = True) -> RunConfig:
    """Read a config by path or name; the path of a name is printed once.

    Without `run_code` nothing that it names is imported, and nothing can be built from it.
    """
    from hpdist.cli.shipped import find_config
    from hpdist.train import config as configuration

    path = find_config(given)
    if path != Path(given) and own_rank() == 0:
        line = f"config {given}: {path}; its first lines say where its data come from"
        print(line, file=sys.stderr, flush=True)
    return configuration.load(path, settings, run_code=run_code)


def split_settings(arguments: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--key.sub value` and `--key=value` from argparse's options.

    Raises ConfigError for a key that does not begin with a section of the config.
    """
    from hpdist.config.section import nearest
    from hpdist.train.config import RunConfig

    others, settings = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.partition("=")[0] in flags:
            others.append(argument)
            continue
        section = argument[2:].partition("=")[0].partition(".")[0]
        if section not in RunConfig.model_fields:
            known = [*(flag[2:] for flag in flags), *RunConfig.model_fields]
            raise ConfigError(f"--{section}: no option or setting{nearest(section, known)}")
        settings.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return others, settings
