"""Which files are a data set's own, by what its config names: its rows may name those."""

from __future__ import annotations

import os
from collections.abc import Iterable

import datasets
import huggingface_hub

from hpdist.data.config import Loading, Source
from hpdist.data.files.named_files import Limits, PathRule, server_of
from hpdist.data.files.paths import fixed_folder, local_path
from hpdist.data.files.retry import is_remote
from hpdist.data.sources.local_files import FOLDERS, LocalFiles, patterns_of


def limits_of(loading: Loading) -> Limits:
    """The largest inputs that a row may have."""
    return Limits(loading.most_pixels, loading.most_samples, loading.most_bytes)


def path_rule(
    config: Source, loading: Loading | None, *, given: bool, files: LocalFiles | None = None
) -> PathRule:
    """Say which files the rows of a data set may name.

    `given` is whether Python code gave the data set as an object, of which no folder is known: its
    rows may name any regular file, unless `data.loading.paths` lists folders. `files` are what was
    found of this machine or listed by address.
    """
    loading = loading or Loading()
    allowed = [] if isinstance(loading.paths, str) else loading.paths
    if loading.paths == "any" or (given and loading.paths == "own"):
        return PathRule((), (), (), True, loading.most_bytes, loading.patience)
    folders, listed, servers = ([], [], []) if given else _own(config, files)
    folders += [_real(path) for path in allowed if not is_remote(path)]
    servers += [path for path in allowed if is_remote(path)]
    return PathRule(
        _unique(folders),
        _unique(listed),
        _unique(servers),
        False,
        loading.most_bytes,
        loading.patience,
    )


def _own(config: Source, files: LocalFiles | None) -> tuple[list[str], list[str], list[str]]:
    """Folders of tables, folders that were listed, and servers."""
    found = [path for of_split in files.splits.values() for path in of_split] if files else []
    servers = [server for path in found if (server := server_of(path)) is not None]
    base = local_path(config.path)
    if base is None or not os.path.exists(base):
        base = None
    named = [fixed_folder(pattern, base or "") for pattern in patterns_of(config.data_files)]
    folders = [folder for folder in named if folder is not None]
    if base is not None:
        folders.append(base if os.path.isdir(base) else os.path.dirname(os.path.abspath(base)))
    if files is not None and files.builder not in FOLDERS:
        return [_real(folder) for folder in folders], [], servers
    # Their pictures and sounds are found by listing, as are those of a folder that says itself how
    # it is read, or of an archive.
    listed = [os.path.abspath(folder) for folder in folders]
    if files is not None:
        return [], listed, servers
    servers += [s for s in map(server_of, patterns_of(config.data_files)) if s is not None]
    return [*map(_real, folders), *_caches(config)], listed, [*servers, *_of_hub(config)]


def _caches(config: Source) -> list[str]:
    """Where `datasets` and the Hub's client put what they have fetched of a data set."""
    repository = "datasets--" + config.path.removeprefix("hf://datasets/").replace("/", "--")
    hub = os.path.join(huggingface_hub.constants.HF_HUB_CACHE, repository)
    fetched = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH)
    return [_real(str(path)) for path in (hub, *fetched)]


def _of_hub(config: Source) -> list[str]:
    """What addresses of a data set on the Hub begin with."""
    if is_remote(config.path):
        found = server_of(config.path)
        return [found] if found else []
    endpoint = huggingface_hub.constants.ENDPOINT
    return [f"hf://datasets/{config.path}", f"{endpoint}/datasets/{config.path}"]


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(local_path(path) or path))


def _unique(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
