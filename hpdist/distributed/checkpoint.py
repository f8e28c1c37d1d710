"""Checkpoints in fragments: the same files however a run is sharded, for any number of ranks.

    step-00000100/
      manifest.json             counters, topology, size and SHA-256 of every file; written last
      rank-00000.safetensors    master weights, teacher and optimizer state that the rank owns
      common.safetensors        what every rank holds alike: buffers, algorithm state

Nothing is pickled. A checkpoint is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpdist.distributed.fragments import Fragment
from hpdist.distributed.reduce import world_size
from hpdist.errors import CheckpointError

VERSION = 1
_MANIFEST = "manifest.json"
_COMMON = "common.safetensors"


def save(
    folder: Path,
    step: int,
    fragments: Mapping[str, Sequence[Fragment]],
    common: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    rank: int,
    keep: int,
) -> Path:
    """Write a checkpoint, then drop all but the newest `keep`.

    `fragments` are this rank's, by kind; `common` and `facts` (JSON) are the same on every rank.
    Collective: every rank must call. Raises CheckpointError.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-step-{step:08d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    own = {
        f"{kind}/{f.name}@{f.start}": f.values.detach().cpu().clone()
        for kind, items in fragments.items()
        for f in items
    }
    files = [_write_tensors(temporary / f"rank-{rank:05d}.safetensors", own)]
    if rank == 0:
        shared = {name: value.detach().cpu().clone() for name, value in common.items()}
        files.append(_write_tensors(temporary / _COMMON, shared))
    everyone = _gather(files)
    if rank == 0:
        manifest = {
            "version": VERSION,
            "step": step,
            "world_size": world_size(),
            "files": {name: entry for part in everyone for name, entry in part},
            **facts,
        }
        _write_bytes(temporary / _MANIFEST, json.dumps(manifest, indent=2).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync_folder(folder)
        for old in list_checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    _barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if (p / _MANIFEST).exists()]
    return sorted(found, key=lambda p: p.name, reverse=True)


class SavedRun:
    """A checkpoint opened for reading.

    Raises CheckpointError where a file is missing, damaged, or of a later format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = _read_manifest(path)
        self._verify()
        self.common = load_file(path / _COMMON)
        self._places: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in self.facts["files"]:
            if file != _COMMON:
                self._index(file)

    def kinds(self) -> set[str]:
        """Which kinds of fragments it holds."""
        return {kind for kind, _ in self._places}

    def read(self, kind: str, like: Fragment) -> Tensor:
        """The saved elements at a fragment's place, from however many files hold them."""
        return self._read(kind, like.name, like.start, like.start + len(like.values))

    def whole(self, kind: str) -> Mapping[str, Tensor]:
        """Every parameter's saved elements, read when asked for."""
        return _Whole(self, kind)

    def _read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        parts, at = [], start
        for first, length, file, key in self._places.get((kind, name), []):
            low, high = max(at, first), min(stop, first + length)
            if low == at and low < high:
                with safe_open(self.path / file, framework="pt") as reader:
                    parts.append(reader.get_slice(key)[low - first : high - first])
                at = high
        if at < stop:
            raise CheckpointError(f"{self.path}: {kind} of {name!r} lacks elements {at} to {stop}")
        return torch.cat(parts)

    def _index(self, file: str) -> None:
        with safe_open(self.path / file, framework="pt") as reader:
            for key in reader.keys():  # noqa: SIM118 (not a dict)
                kind, _, place = key.partition("/")
                name, _, start = place.rpartition("@")
                length = reader.get_slice(key).get_shape()[0]
                self._places.setdefault((kind, name), []).append((int(start), length, file, key))
        for places in self._places.values():
            places.sort()

    def _verify(self) -> None:
        for name, entry in self.facts["files"].items():
            file = self.path / name
            if not file.exists() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file} is missing or truncated")
            if _hash(file) != entry["sha256"]:
                raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")


class _Whole(Mapping[str, Tensor]):
    def __init__(self, saved: SavedRun, kind: str) -> None:
        self._saved, self._kind = saved, kind
        self._sizes = {
            name: max(first + length for first, length, _, _ in places)
            for (k, name), places in saved._places.items()
            if k == kind
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sizes:
            raise CheckpointError(f"{self._saved.path} holds no {self._kind} of {name!r}")
        return self._saved._read(self._kind, name, 0, self._sizes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / _MANIFEST} cannot be read: {error}") from error
    if facts["version"] > VERSION:
        raise CheckpointError(
            f"{path} has format {facts['version']}, this hpdist knows up to {VERSION}; "
            "upgrade hpdist"
        )
    return facts


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    _sync_file(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync_file(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _gather(own: list[tuple[str, dict[str, Any]]]) -> list[list[tuple[str, dict[str, Any]]]]:
    if world_size() == 1:
        return [own]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return everyone
