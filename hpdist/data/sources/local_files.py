"""Which files of this machine a config names: how they are read, which split each belongs to.

    found = local_files(config.data.labeled, "data.labeled")
    found.splits["train"]  # ['/data/set/ant/00.png', …]

A folder's files are sorted into splits as `datasets` does it: by the names of folders, else by
those of files, else all are `train`. Files without rows are left out.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec  # type: ignore[import-untyped]
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hpdist.data.config import LabelColumn, Source
from hpdist.data.files.paths import below, did_you_mean, local_path, matches
from hpdist.data.sources.class_folders import class_folders, names_split
from hpdist.errors import DataError

_log = logging.getLogger("hpdist.data")

_TABLES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".tar": "webdataset",
}
_VIDEO = (".avi", ".asf", ".mp4", ".mov", ".m4v", ".mkv", ".mpg", ".webm", ".f4v", ".wmv", ".nut")
_AUDIO = {ext: "audiofolder" for ext in AudioFolder.EXTENSIONS if ext not in _VIDEO}
_PICTURES = dict.fromkeys(ImageFolder.EXTENSIONS, "imagefolder")
_BUILDERS = _AUDIO | _PICTURES | _TABLES
FOLDERS = ("imagefolder", "audiofolder")
"""Builders that take a class from a folder's name, and columns from a file of metadata."""
FILE_BUILDERS = tuple(sorted(set(_BUILDERS.values())))
ENDINGS = tuple(_BUILDERS)
"""How the names of files with data end."""
_METADATA = tuple(ImageFolder.METADATA_FILENAMES)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_ARCHIVES = (".zip", ".7z", ".rar", *_COMPRESSED)
_MAY_BE_EMPTY = ("csv", "json", "text")
_SMALL = 1 << 16  # bytes: a file that holds more is not looked into for whether it holds rows
_HEADERS = {"header", "names", "column_names", "skiprows"}  # options that move a file's first row

_SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


@dataclass(frozen=True)
class LocalFiles:
    """Files of this machine, and how `datasets` reads them."""

    builder: str
    """The name of the `datasets` builder."""
    splits: dict[str, list[str]]
    """Absolute paths, by split."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the builder that follow from the files."""
    base: str = ""
    """The folder that all lie in; folders below it may be named `column=value`."""


def source_name(config: Source, dataset: Any, where: str) -> str:
    """What messages call a dataset: the setting, and what it names."""
    if dataset is not None:
        return f"{where} (the {type(dataset).__name__} given)"
    files = f", data_files {config.data_files!r}" if config.data_files else ""
    return f"{where} ({config.path}{files}, split {config.split!r})"


def local_files(config: Source, where: str) -> LocalFiles | None:
    """Find the files that a config names; None where `datasets` has to find them.

    That is so of the Hub and other servers, archives, and folders that say themselves, in their
    README.md, how they are read. Raises DataError where nothing is there, or nothing but emptiness.
    """
    path = local_path(config.path)
    builder: str | None = None
    if config.path in FILE_BUILDERS and config.data_files is not None:
        builder, base = config.path, ""
    elif path is None or config.name is not None or not os.path.exists(path):
        return None
    elif os.path.isfile(path):
        _check_ending(path, config, where)
        return _sorted_out({"train": [path]}, os.path.dirname(path), None, config, where)
    elif _has_card(path):
        return None
    else:
        base = path
    if config.data_files is None:
        files, base = matches(path or "", "")
        return _sorted_out(_by_split(files, base), base, builder, config, where)
    patterns = _patterns_by_split(config.data_files)
    if any(_is_elsewhere(pattern) for part in patterns.values() for pattern in part):
        return None
    splits, base = _matched(patterns, base, where)
    return _sorted_out(splits, base, builder, config, where)


def _matched(
    patterns: Mapping[str, Sequence[str]], base: str, where: str
) -> tuple[dict[str, list[str]], str]:
    """The files of every split, each once, and the folder that all patterns begin in."""
    splits: dict[str, list[str]] = {}
    below = []
    for split, part in patterns.items():
        for pattern in part:
            found, fixed = matches(pattern, base)
            if not found:
                raise DataError(
                    f"{where}.data_files: nothing matches {pattern!r} in {base or os.getcwd()}"
                    f"{did_you_mean(os.path.join(base, pattern))}"
                )
            splits.setdefault(split, []).extend(found)
            below.append(fixed)
    unique = {split: list(dict.fromkeys(files)) for split, files in splits.items()}
    return unique, os.path.commonpath(below)


def extension(file: str) -> str:
    """The lower-case end of a file's name that says its format, before that of a compression."""
    stem, ending = os.path.splitext(file.lower())
    return os.path.splitext(stem)[1] if ending in _COMPRESSED else ending


def patterns_of(data_files: Any) -> list[str]:
    """All paths and patterns of `data_files`."""
    if data_files is None:
        return []
    return [pattern for part in _patterns_by_split(data_files).values() for pattern in part]


def _patterns_by_split(data_files: Any) -> dict[str, list[str]]:
    parts = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    return {str(k): [v] if isinstance(v, str) else list(v) for k, v in parts.items()}


def _is_elsewhere(pattern: str) -> bool:
    return local_path(pattern) is None


def _check_ending(path: str, config: Source, where: str) -> None:
    """Raise DataError for a file of no known kind, for which the Hub would be asked."""
    if extension(path) in _BUILDERS or path.lower().endswith(_ARCHIVES):
        return
    raise DataError(
        f"{where}.path: the kind of {config.path!r} is not known by how its name ends; name it in "
        f"path, as one of {', '.join(FILE_BUILDERS)}, and the file in data_files, or rename the "
        f"file ({', '.join(_TABLES)})"
    )


def _has_card(folder: str) -> bool:
    """Whether a folder says itself which files it has: a data set of the Hub, cloned."""
    card = os.path.join(folder, "README.md")
    if os.path.exists(os.path.join(folder, ".huggingface.yaml")):
        return True
    if not os.path.isfile(card):
        return False
    with open(card, encoding="utf-8", errors="replace") as file:
        head = re.match(r"---\s*\n(.*?)\n---", file.read(1 << 20), re.DOTALL)
    return bool(head and re.search(r"^(configs|dataset_info):", head[1], re.MULTILINE))


def _sorted_out(
    splits: Mapping[str, Sequence[str]], base: str, builder: str | None, config: Source, where: str
) -> LocalFiles | None:
    """Choose the builder, and of every split the files that it reads."""
    every = [file for files in splits.values() for file in files]
    options: dict[str, Any] = {}
    if builder is None:
        builder = _builder_of(every)
        if builder is None:
            return None
        splits = {split: [f for f in fs if _fits(f, builder)] for split, fs in splits.items()}
    if builder == "csv":
        options |= _separator(every, where)
    if builder in FOLDERS:
        options |= _class_options(splits, base, config, where)
    chained = next((file for file in every if "::" in file), None)
    if chained is not None:
        raise DataError(
            f"{where}: {chained} cannot be read: `datasets` takes :: for the mark of an archive; "
            "rename the file or folder"
        )
    headed = builder == "csv" and not _HEADERS & set(config.options)
    kept = {split: _with_rows(files, builder, headed) for split, files in splits.items()}
    full = {split: files for split, files in kept.items() if files}
    if not full:
        empty = f"its {len(every)} files are all" if len(every) > 1 else "its file is"
        raise DataError(f"{source_name(config, None, where)}: holds no rows; {empty} empty")
    return LocalFiles(builder, full, options, base)


def _builder_of(files: Iterable[str]) -> str | None:
    counts = Counter(
        _BUILDERS[extension(file)]
        for file in files
        if extension(file) in _BUILDERS and os.path.basename(file) not in _METADATA
    )
    return counts.most_common(1)[0][0] if counts else None


def _fits(file: str, builder: str) -> bool:
    is_metadata = builder in FOLDERS and os.path.basename(file) in _METADATA
    return is_metadata or _BUILDERS.get(extension(file)) == builder


def _separator(files: Sequence[str], where: str) -> dict[str, Any]:
    """Files that end in .tsv have tabs between their columns."""
    endings = {extension(file) == ".tsv" for file in files if extension(file) in (".csv", ".tsv")}
    if len(endings) > 1:
        raise DataError(
            f"{where}.data_files: there are .csv and .tsv files, whose columns are told apart by "
            "different characters; name those of one kind"
        )
    return {"sep": "\t"} if endings == {True} else {}


def _class_options(
    splits: Mapping[str, Sequence[str]], base: str, config: Source, where: str
) -> dict[str, Any]:
    """Whether the folders that pictures or sounds lie in are their classes."""
    every = [file for files in splits.values() for file in files]
    if "drop_labels" in config.options or any(os.path.basename(f) in _METADATA for f in every):
        return {}
    held = {
        split: [file for file in files if _BUILDERS.get(extension(file)) in FOLDERS]
        for split, files in splits.items()
    }
    found = class_folders(held, base)
    if isinstance(config, LabelColumn):
        found.require(where)
    return {"drop_labels": not found.are_classes}


def _with_rows(files: Sequence[str], builder: str, headed: bool) -> list[str]:
    """Leave out files that hold nothing; those of Parquet are told by their footers, later."""
    if builder not in _MAY_BE_EMPTY:
        return list(files)
    return [file for file in files if not _is_empty(file, builder, headed)]


def _is_empty(file: str, builder: str, headed: bool) -> bool:
    """Whether a text file has no rows; one that is `headed` may still have the columns' names."""
    if os.path.getsize(file) > _SMALL:
        return False
    try:
        with fsspec.open(file, "rb", compression="infer") as opened:
            held = opened.read(2 * _SMALL)
    except Exception:  # whoever reads it says better what is wrong with it
        return False
    lines = [line for line in held.split(b"\n") if line.strip(b"\0\r\t ")]
    none = builder == "json" and re.fullmatch(rb"\s*\[\s*\]\s*", held) is not None
    return none or len(lines) <= int(headed)


def _by_split(files: Sequence[str], base: str) -> dict[str, list[str]]:
    """Sort a folder's files into splits."""
    relative = [below(file, base).replace(os.sep, "/") for file in files]
    sharded = [_SHARDED.fullmatch(name) for name in relative]
    if any(sharded):
        names = sorted({found[1] for found in sharded if found}, key=_split_order)
        return {
            name: [f for f, found in zip(files, sharded, strict=True) if found and found[1] == name]
            for name in names
        }
    for of_folders in (True, False):
        found = {
            str(split): [
                file
                for file, name in zip(files, relative, strict=True)
                if _in_split(str(split), name, of_folders)
            ]
            for split in SPLIT_KEYWORDS
        }
        if any(found.values()):
            _log_left_out(files, found, base)
            return {split: part for split, part in found.items() if part}
    return {"train": list(files)}


def _log_left_out(files: Sequence[str], splits: Mapping[str, list[str]], base: str) -> None:
    """Say which files with data belong to no split, since nothing else would tell of them."""
    taken = {file for part in splits.values() for file in part}
    left = [file for file in files if file not in taken and extension(file) in _BUILDERS]
    if left:
        names = ", ".join(split for split, part in splits.items() if part)
        _log.warning(
            "%s: %d of its files are in no split, since others are named after %s: %s is left out, "
            "for one; rename the folders, or name the files in data_files",
            *(base, len(left), names, left[0]),
        )


def _in_split(split: str, name: str, of_folders: bool) -> bool:
    *folders, file = name.split("/")
    if of_folders:
        return any(names_split(split, folder) for folder in folders)
    return names_split(split, file, of_file=True)


def _split_order(name: str) -> tuple[int, str]:
    usual = [str(split) for split in SPLIT_KEYWORDS]
    return (usual.index(name) if name in usual else len(usual), name)
