"""Folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` wrote.

They are read in place, as memory-mapped tables: there is nothing to prepare, and any row is at
hand. `streaming: true` therefore changes nothing of them, and costs none of a table's promises.
"""

from __future__ import annotations

import json
import os

import datasets

from hpdist.data.config import Source
from hpdist.data.files.paths import local_path
from hpdist.data.files.splits import ALL, check_known, names_in, sliced, spelled_out
from hpdist.errors import ConfigError, DataError


def is_saved(config: Source) -> bool:
    """Whether a config names such a folder."""
    path = local_path(config.path)
    return path is not None and (_is_dict(path) or _is_table(path))


def open_saved(config: Source, where: str) -> datasets.Dataset:
    """Open the rows that the config's split names. Raises ConfigError and DataError."""
    for setting in ("name", "data_files", "revision", "options"):
        if getattr(config, setting):
            raise ConfigError(
                f"{where}.{setting}: {config.path!r} is a folder of save_to_disk, which has none; "
                "leave it out"
            )
    path = local_path(config.path) or ""
    if not _is_dict(path):
        table = datasets.load_from_disk(path)
        own = str(table.split) if table.split is not None else "train"
        asked = [name for name in names_in(config.split) if name not in (own, "train", ALL)]
        if asked:
            raise DataError(
                f"{where}.split: {config.path!r} holds one table, of the split {own!r}, and none "
                f"of {asked[0]!r}"
            )
        return sliced(dict.fromkeys(("train", own), table), config.split.replace(ALL, own), where)
    with open(os.path.join(path, "dataset_dict.json"), encoding="utf-8") as file:
        splits = json.load(file)["splits"]
    split = spelled_out(config.split, splits)
    check_known(split, splits, where)
    tables = {name: datasets.load_from_disk(os.path.join(path, name)) for name in names_in(split)}
    return sliced(tables, split, where)


def _is_dict(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "dataset_dict.json"))


def _is_table(path: str) -> bool:
    return all(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_info.json")
    )
