"""Keeps what the footers of a dataset say on disk, under the versions of its files."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.files.open import FileVersion
from hpdist.data.files.partitions import Partitions
from hpdist.data.stream.index import DataFile
from hpdist.data.stream.permute import Int64Array

GROUP_ARRAYS = ("file", "number", "first", "rows", "start", "size", "stored")

_VERSION = 5  # of the cache's format


@dataclass(frozen=True)
class Groups:
    """All that is known of every row group, while an index is made of it."""

    files: tuple[DataFile, ...]
    schema: bytes
    columns: tuple[str, ...]
    file: Int64Array  # [groups], index into files
    number: Int64Array  # [groups], in the file
    first: Int64Array  # [groups], the first row used
    rows: Int64Array  # [groups], rows used
    start: Int64Array  # [groups], id of the first row used
    size: Int64Array  # [groups], bytes of the whole row group's columns that are read, in memory
    stored: Int64Array  # [groups], and in the file
    folders: Partitions = field(default_factory=Partitions)

    @property
    def arrow_schema(self) -> pa.Schema:
        """The columns and their types."""
        return pa.ipc.read_schema(pa.py_buffer(self.schema))


def cache_file(
    paths: Sequence[str], versions: Sequence[FileVersion], folders: Partitions
) -> Path | None:
    """Where the footers of these versions are kept; nowhere if a version cannot be told."""
    if not all(version.tag or "@" in path for path, version in zip(paths, versions, strict=True)):
        return None
    facts: list[Any] = [_VERSION, pa.__version__]
    facts += [[p, v.size, v.tag] for p, v in zip(paths, versions, strict=True)]
    facts += [[column.name, str(column.type)] for column in folders.schema]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_CACHE_HOME, "hpdist", "index", f"{key}.npz")


def keep(cache: Path | None, index: Groups) -> None:
    """Write the cache; a disk that is full or read-only costs the next start its time only."""
    if cache is None:
        return
    # Not their paths, which may hold a password: whoever asks has them.
    files = [[f.version.size, f.version.tag, f.rows, f.digest] for f in index.files]
    facts = json.dumps([index.columns, files]).encode()
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.savez(
                out,
                facts=np.frombuffer(facts, np.uint8),
                schema=np.frombuffer(index.schema, np.uint8),
                groups=np.stack([getattr(index, key) for key in GROUP_ARRAYS]),
            )
        os.replace(temporary, cache)
    except OSError:
        temporary.unlink(missing_ok=True)


def load(cache: Path | None, paths: Sequence[str]) -> Groups | None:
    """What an earlier start kept of these files; None where there is nothing, or not all of it."""
    if cache is None or not cache.exists():
        return None
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            columns, facts = json.loads(kept["facts"].tobytes())
            arrays = dict(zip(GROUP_ARRAYS, kept["groups"], strict=True))
            schema = kept["schema"].tobytes()
            files = [
                DataFile(path, FileVersion(size, tag), rows, digest)
                for path, (size, tag, rows, digest) in zip(paths, facts, strict=True)
            ]
        pa.ipc.read_schema(pa.py_buffer(schema))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(array.dtype != np.int64 or array.ndim != 1 for array in arrays.values()):
        return None
    return Groups(
        tuple(files),
        schema,
        tuple(columns),
        **arrays,
    )
