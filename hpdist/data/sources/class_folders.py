"""Whether the folders that pictures and sounds lie in are their classes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from datasets.data_files import SPLIT_KEYWORDS

from hpdist.data.files.paths import below
from hpdist.errors import DataError

_log = logging.getLogger("hpdist.data")

_SEPARATORS = r"[-._ 0-9]"


def names_split(split: str, part: str, of_file: bool = False) -> bool:
    """Whether a folder's name, or that of a file, names a split, as `datasets` takes them."""
    return _naming(split, of_file).fullmatch(part) is not None


@cache
def _naming(split: str, of_file: bool) -> re.Pattern[str]:
    known = {str(name): words for name, words in SPLIT_KEYWORDS.items()}
    keywords = "|".join(map(re.escape, known.get(split, [split])))
    behind = f"{_SEPARATORS}.*" if of_file else f"(?:{_SEPARATORS}.*)?"
    return re.compile(f"(?:.*{_SEPARATORS})?(?:{keywords}){behind}")


@dataclass(frozen=True)
class ClassFolders:
    """How deep files lie in folders that name no split, and one file of each depth."""

    base: str
    depths: dict[int, str]
    empty: tuple[str, ...] = ()
    """Folders beside those of classes that hold no file."""

    @property
    def are_classes(self) -> bool:
        """Whether each file's folder is its class: all lie equally deep in some.

        `datasets` would take a single class for none, and folders named after splits for classes.
        """
        return len(self.depths) == 1 and 0 not in self.depths

    def require(self, where: str) -> None:
        """Raise DataError where folders tell no classes; say which hold nothing."""
        if not self.are_classes:
            first, *others = (
                os.path.relpath(self.depths[at], self.base) for at in sorted(self.depths)
            )
            what = (
                f"{first} lies less deep in folders than {others[0]}; put every file into the "
                "folder of its class"
                if others
                else f"{first} lies in no folder of a class; make one for each class"
            )
            raise DataError(
                f"{where}: the folders in {self.base} tell no classes, since {what}, or write a "
                "metadata.csv with the columns file_name and label"
            )
        if self.empty:
            _log.warning(
                "%s: no class is made of folders that hold no files: %s",
                where,
                ", ".join(self.empty),
            )


def class_folders(splits: Mapping[str, Sequence[str]], base: str) -> ClassFolders:
    """Look at the folders between `base` and each file."""
    folders = []  # of each file: itself, the folders it lies in, and those that name no split
    for split, files in splits.items():
        for file in files:
            parts = below(file, base).split(os.sep)[:-1]
            folders.append((file, parts, [p for p in parts if not names_split(split, p)]))
    by_split = all(len(rest) < len(parts) for _, parts, rest in folders)
    depths: dict[int, str] = {}
    for file, parts, rest in folders:
        depths.setdefault(len(rest if by_split else parts), file)
    first = {parts[0] for _, parts, _ in folders if parts}
    empty = () if by_split or set(depths) != {1} else _others(base, first)
    return ClassFolders(base, depths, empty)


def _others(base: str, taken: set[str]) -> tuple[str, ...]:
    """The folders in `base` beside those taken."""
    with os.scandir(base) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__"))]
    return tuple(sorted(set(names) - taken))
