"""The configs and launch files that come with hpdist, found from any folder.

    hpdist configs              # lists them
    hpdist train digits         # trains with one of them
    hpdist configs --copy .     # copies configs/ and launch/ here, to edit and to launch with

A wheel has them within the package, a checkout beside it.
"""

from __future__ import annotations

import os
import shutil
from importlib import resources
from pathlib import Path

from hpdist.config.section import nearest
from hpdist.errors import ConfigError

_FOLDERS = ("configs", "launch")
_GENERATED = "__pycache__"


def shipped(folder: str) -> Path:
    """Find `configs` or `launch`. Raises ConfigError in an installation without them."""
    package = Path(str(resources.files("hpdist")))
    for place in (package / folder, package.parent / folder):
        if place.is_dir():
            return place
    raise ConfigError(f"this installation of hpdist came without its {folder}/; install it again")


def find_config(given: str) -> Path:
    """Find a config file: by its path, or else a shipped one by its name.

    A name has neither folder nor extension. Raises ConfigError if there is neither.
    """
    path = Path(given)
    is_name = path.name == given and not path.suffix
    if path.is_file() or not is_name:
        return path
    known = {file.stem: file for file in sorted(shipped("configs").glob("*.yaml"))}
    if given not in known:
        raise ConfigError(
            f"there is no file {given!r} in {os.getcwd()}, and no config of this name comes with "
            f"hpdist{nearest(given, known)}; `hpdist configs` lists those that do"
        )
    return known[given]


def list_configs() -> list[str]:
    """A line for each shipped config: its name, and the beginning of its first line."""
    lines = []
    for file in sorted(shipped("configs").glob("*.yaml")):
        with file.open(encoding="utf-8") as text:
            lines.append(f"{file.stem:26} {text.readline().lstrip('# ').rstrip()}")
    return lines


def copy_shipped(target: Path) -> list[Path]:
    """Copy configs/ and launch/ into a folder; return what was written.

    Existing equal files are left alone; raises ConfigError if one differs, and if it cannot be
    written.
    """
    pairs = [
        (file, target / name / file.relative_to(shipped(name)))
        for name in _FOLDERS
        for file in sorted(shipped(name).rglob("*"))
        if file.is_file() and _GENERATED not in file.parts
    ]
    try:
        there = {new for _, new in pairs if new.exists()}
        for file, new in pairs:
            if new in there and new.read_bytes() != file.read_bytes():
                raise ConfigError(f"configs: {str(new)!r} exists and differs; nothing was copied")
        for file, new in pairs:
            if new not in there:
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, new)
                if os.access(file, os.X_OK):  # else the umask decides
                    new.chmod(new.stat().st_mode | (new.stat().st_mode & 0o444) >> 2)
    except OSError as error:
        raise ConfigError(f"configs: cannot copy into {str(target)!r}: {error}") from error
    return [new for _, new in pairs if new not in there]
