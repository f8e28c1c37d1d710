"""Resolves paths in a launch file: the launcher reads Accelerate's config, the ranks do not.

Accelerate resolves a relative `deepspeed_config_file` from the current folder only, so that a
launch file could only be used from the folder that it was written for.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from hpdist.distributed.launcher_watch import find_launcher
from hpdist.errors import ConfigError

_OPTION = "--config_file"


def find_deepspeed(given: str) -> str:
    """Find the DeepSpeed JSON that a launch file names, whatever the current folder.

    A relative path is resolved from the current folder; if it does not exist, from the nearest
    folder above the launch file (`accelerate launch --config_file`) that has it. Raises
    ConfigError if no such file is found.
    """
    path = Path(given).expanduser()
    if path.exists():
        return given if path == Path(given) else str(path)
    launch_file = None if path.is_absolute() else _launch_file()
    if launch_file is not None:
        for folder in launch_file.parents:
            if (folder / path).is_file():
                return str(folder / path)
    places = os.getcwd() if launch_file is None else f"{os.getcwd()} or above {launch_file}"
    where = "" if path.is_absolute() else f" in {places}"
    raise ConfigError(
        f"cannot read the DeepSpeed config {given!r}: there is no such file{where}; give "
        "deepspeed_config_file an absolute path, or have `hpdist configs --copy .` write hpdist's "
        "own launch files here"
    )


def _launch_file() -> Path | None:
    """The config file given to the launcher of this rank, if it can be found out."""
    launcher = find_launcher()
    if launcher is None:
        return None
    try:
        process = psutil.Process(launcher.pid)
        words, folder = process.cmdline(), process.cwd()
    except psutil.Error:  # another user's
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == _OPTION:
            return Path(os.path.abspath(Path(folder, value if equals else following).expanduser()))
    return None
