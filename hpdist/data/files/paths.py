"""Local paths as people write them, and the files that a folder or a pattern names.

    files, base = matches("~/sets/[D] set/*.png", "")

A path is taken as it is written before any of its characters is taken for a wildcard, so that
brackets, stars and question marks in the names of folders and files do no harm. Links are followed
to files and to folders; one that leads back to a folder above it is not entered again.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from glob import escape, glob, iglob
from urllib.parse import unquote

from fsspec.utils import glob_translate  # type: ignore[import-untyped]

_log = logging.getLogger("hpdist.data")

_LOCAL = re.compile(r"^(?:file|local)://(?:localhost(?=/))?")
_MAGIC = re.compile(r"[*?[]")
_JUNK = ("Thumbs.db", "desktop.ini", "__MACOSX", "_delta_log", "_temporary")
_IGNORED = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json")
"""What `datasets` keeps beside the data: none of it holds rows."""


def local_path(text: str) -> str | None:
    """Turn what a config names into a path of this machine; None for any other address.

    `~` is the home folder; of a `file://` address, percent signs may stand for characters. A name
    is found in whatever Unicode form the disk holds it.
    """
    scheme = _LOCAL.match(text)
    if scheme is not None:
        path = text[scheme.end() :]
        return _spelled(path if os.path.lexists(path) else unquote(path))
    path = _spelled(os.path.expanduser(text))
    if os.path.lexists(path):
        return path
    return None if "://" in text or "::" in text else path


def absolute(path: str) -> str:
    """Make a path absolute; `..` behind a link means the folder above what the link leads to."""
    return os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)


def below(file: str, folder: str) -> str:
    """Give a file's path from a folder on; `relpath` of a million files takes long."""
    start = os.path.join(folder, "")
    return file[len(start) :] if file.startswith(start) else os.path.relpath(file, folder)


def matches(pattern: str, base: str) -> tuple[list[str], str]:
    """Find the files that a path, a folder or a pattern names, and the folder that all lie below.

    `base` is what a relative one begins at. The files are absolute and sorted by name.
    """
    path = os.path.join(base, local_path(pattern) or pattern)
    path = _spelled(path)
    if os.path.isfile(path):
        path = absolute(path)
        return [path], os.path.dirname(path)
    if os.path.isdir(path):
        folder = absolute(path)
        return list(walk(folder)), folder
    fixed, rest = _split_pattern(path)
    fixed = absolute(fixed or os.curdir)
    if not _MAGIC.search(rest):
        return [], fixed
    found = set()
    for form in {rest, *(unicodedata.normalize(form, rest) for form in ("NFC", "NFD"))}:
        found.update(_globbed(fixed, form))
    return sorted(found), fixed


def fixed_folder(pattern: str, base: str) -> str | None:
    """Give the folder that `matches` finds all files of a pattern below; None of an address."""
    local = local_path(pattern)
    if local is None:
        return None
    path = _spelled(os.path.join(base, local))
    if os.path.isfile(path):
        return os.path.dirname(absolute(path))
    return absolute(path if os.path.isdir(path) else _split_pattern(path)[0] or os.curdir)


def walk(folder: str) -> Iterator[str]:
    """Yield every file below a folder that is no hidden one, sorted by their paths."""
    files: list[str] = []
    lost: list[str] = []
    _walk(folder, (), files, lost)
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        _log.warning("%s: is a link that leads nowhere, and is left out%s", lost[0], more)
    yield from sorted(files)


def neighbour(path: str) -> str | None:
    """Find the path that was probably meant, where one part of one is misspelled.

    What follows that part exists, or is a pattern that some file matches.
    """
    parts = path.rstrip(os.sep).split(os.sep)
    for number, part in enumerate(parts):
        above = os.sep.join(parts[:number])
        above = above or (os.sep if number and path.startswith(os.sep) else "")
        if os.path.lexists(os.path.join(above, part)) or not part:
            continue
        try:
            names = [name for name in os.listdir(above or os.curdir) if not name.startswith(".")]
        except OSError:
            return None
        for name in difflib.get_close_matches(part, names, 3):
            folder, rest = os.path.join(above, name), parts[number + 1 :]
            meant = os.path.join(folder, *rest)
            if os.path.exists(meant):
                return meant
            if any(map(_MAGIC.search, rest)) and any(iglob(os.path.join(escape(folder), *rest))):
                return meant
        return None
    return None


def did_you_mean(path: str) -> str:
    """Say what was probably meant, to be put behind a message; nothing where none is close."""
    meant = neighbour(path)
    return f"; did you mean {meant!r}?" if meant else ""


def _walk(
    folder: str, above: tuple[tuple[int, int], ...], files: list[str], lost: list[str]
) -> None:
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:  # a link to a folder that this one lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                if not entry.name.startswith("__"):
                    _walk(entry.path, (*above, here), files, lost)
            elif entry.is_file():
                if not _is_mark(entry.name):
                    files.append(entry.path)
            elif entry.is_symlink():
                lost.append(entry.path)


def _is_hidden(name: str) -> bool:
    """Whether a file or folder holds no data by its name: hidden, or kept by some program."""
    return name.startswith(".") or name in _JUNK or name in _IGNORED


def _is_mark(name: str) -> bool:
    """Whether a file is a mark of Spark or Parquet, such as `_SUCCESS` and `_metadata`."""
    return name.startswith("_") and "." not in name


def _globbed(fixed: str, rest: str) -> list[str]:
    """The files below a folder that match a pattern."""
    if "**" not in rest:
        named = glob(os.path.join(escape(fixed), rest))
        return [file for file in named if os.path.isfile(file) and not _hidden_by(file, rest)]
    matching = re.compile(glob_translate(os.path.join(escape(fixed), rest)))
    return [file for file in walk(fixed) if matching.match(file)]


def _hidden_by(file: str, pattern: str) -> bool:
    """Whether a name is hidden and the pattern's last part asks for no such name."""
    name, last = os.path.basename(file), pattern.rpartition(os.sep)[2]
    return (_is_hidden(name) or _is_mark(name)) and last[0] not in "._"


def _split_pattern(path: str) -> tuple[str, str]:
    """Split into the folder that is there as it is written, and the rest."""
    parts = path.split(os.sep)
    for number in range(len(parts) - 1, 0, -1):
        folder = os.sep.join(parts[:number]) or os.sep
        if os.path.isdir(folder):
            return folder, os.sep.join(parts[number:])
    return "", path


def _spelled(path: str) -> str:
    """The path as the disk spells it: some hold é as one character, others as two."""
    if path.isascii() or os.path.lexists(path):
        return path
    at = os.sep if path.startswith(os.sep) else ""
    for part in path.split(os.sep):
        here = os.path.join(at, part)
        if part and not os.path.lexists(here):
            here = os.path.join(at, _matching_entry(at or os.curdir, part))
        at = here
    return at


def _matching_entry(folder: str, name: str) -> str:
    if not os.path.isdir(folder):
        return name
    wanted = unicodedata.normalize("NFC", name)
    for found in os.listdir(folder):
        if unicodedata.normalize("NFC", found) == wanted:
            return found
    return name
