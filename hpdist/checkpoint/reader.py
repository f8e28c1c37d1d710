"""Checkpoints in fragments: the same files however a run is sharded, for any number of ranks.

`writer` writes them; here they are found, verified and read.

    step-00000100/
      manifest.json             counters, topology, size and SHA-256 of every file; written last
      rank-00000.safetensors    the rank's part of master weights, teacher, optimizer and
                              algorithm state
      common.safetensors        what is equal on every rank: buffers, algorithm state

Nothing is pickled. A checkpoint is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hpdist.checkpoint.manifest import (
    COMMON,
    MANIFEST,
    LaterFormatError,
    check_types,
    hash_of,
    list_checkpoints,
    read_manifest,
    regular_size,
    step_of,
)
from hpdist.distributed.collectives import gathered, run_on_main, world_size
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import with_plain_names
from hpdist.errors import CheckpointError
from hpdist.messages.progress import working


@working("verifying checkpoints")
def open_newest(
    folder: Path,
    log: Callable[[str], None],
    before: int | None = None,
    facts: type[BaseModel] | None = None,
) -> SavedRun | None:
    """Open the newest checkpoint that verifies; problems of newer ones are logged.

    With `before`, only checkpoints of earlier steps count. `facts` are the types of the facts that
    the run adds to a manifest: a manifest with other types does not verify.

    Each rank verifies its share of the files, and all agree. Collective: every rank must call.
    Raises CheckpointError if there are checkpoints but none is intact, or one is of a later
    format.
    """
    rank = dist.get_rank() if world_size() > 1 else 0
    newest = run_on_main(lambda: [path.name for path in list_checkpoints(folder)])
    newest = [name for name in newest if before is None or (step_of(name) or 0) < before]
    for name in newest:
        saved, error = None, None
        try:
            saved = SavedRun(folder / name, rank, world_size())
            if facts is not None:
                check_types(facts, saved.facts, saved.path / MANIFEST)
        except CheckpointError as raised:
            error = raised
        errors = [e for e in gathered(error) if e is not None]
        if not errors and saved is not None:
            return saved
        if isinstance(errors[0], LaterFormatError):
            errors[0].everywhere = True
            raise errors[0]
        log(f"checkpoint {name} is skipped: {errors[0]}")
    if newest:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is whole ({', '.join(newest)}); choose another "
            "run.name to start anew, or remove the run folder"
        )
    return None


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps; to be called on one rank."""
    for path in list_checkpoints(folder):
        if (step_of(path.name) or 0) > step:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, or only the link if it lies elsewhere. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class SavedRun:
    """A checkpoint opened for reading; rank r of `ranks` verifies every ranks-th of its files.

    Raises CheckpointError if a file is missing, damaged, or of a later format.
    """

    def __init__(self, path: Path, rank: int = 0, ranks: int = 1) -> None:
        self.path = path
        self.facts = read_manifest(path)
        self._verify(rank, ranks)
        self._spans: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        self._files: dict[str, Any] = {}
        try:
            self.common = load_file(path / COMMON)
            for file in self.facts["files"]:
                if file != COMMON:
                    self._index(file)
            self._forget_wrappers()
        except (OSError, SafetensorError) as error:  # of a file that another rank verifies
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def kinds(self) -> set[str]:
        """The kinds of fragments that it holds."""
        return {kind for kind, _ in self._spans}

    def holds(self, kind: str, name: str) -> bool:
        """Whether it has fragments of a kind for a parameter."""
        return (kind, name) in self._spans

    def read(self, kind: str, like: Fragment) -> Tensor:
        """The saved elements at a fragment's place, from any number of files."""
        return self._read(kind, like.name, like.start, like.start + len(like.values))

    def whole(self, kind: str) -> WholeKind:
        """Every parameter's saved elements, read on access."""
        return WholeKind(self, kind)

    def _read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        spans = self._spans.get((kind, name), [])
        parts = [torch.empty(0)][: start == stop]  # a rank may own nothing of a parameter
        at = start
        # Fragments do not overlap, so the first one needed is the last that begins by `start`.
        for first, length, file, key in spans[max(bisect_right(spans, (start + 1,)) - 1, 0) :]:
            if first >= stop:
                break
            low, high = max(at, first), min(stop, first + length)
            if low == at and low < high:
                parts.append(self._open(file).get_slice(key)[low - first : high - first])
                at = high
        if at < stop:
            raise CheckpointError(f"{self.path}: {kind} of {name!r} lacks elements {at} to {stop}")
        return torch.cat(parts)

    def _open(self, file: str) -> Any:
        """Open a file once: its header has an entry for every fragment."""
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]

    def _index(self, file: str) -> None:
        reader = self._open(file)
        for key in reader.keys():  # noqa: SIM118 (not a dict)
            kind, _, place = key.partition("/")
            name, _, start = place.rpartition("@")
            length = reader.get_slice(key).get_shape()[0]
            self._spans.setdefault((kind, name), []).append((int(start), length, file, key))
        for spans in self._spans.values():
            spans.sort()

    def _forget_wrappers(self) -> None:
        """Remove from all names the segments of wrappers that earlier versions wrote."""
        under_ddp = self.facts["world_size"] > 1
        for kind in self.kinds() - {"algorithm"}:
            keys = [key for key in self._spans if key[0] == kind]
            named = {key[1]: self._spans.pop(key) for key in keys}
            plain = with_plain_names(named, under_ddp=under_ddp)
            self._spans |= {(kind, name): spans for name, spans in plain.items()}
        for prefix in ("buffer/", "teacher/"):
            own = [key for key in self.common if key.startswith(prefix)]
            tensors = {key.removeprefix(prefix): self.common.pop(key) for key in own}
            values = with_plain_names(tensors, under_ddp=under_ddp)
            self.common |= {prefix + name: value for name, value in values.items()}
        identity = self.facts.get("identity", {})
        if "parameters" in identity:
            shapes = with_plain_names(identity["parameters"], under_ddp=under_ddp)
            identity["parameters"] = shapes

    def _verify(self, rank: int, ranks: int) -> None:
        """Check the sizes of all files, and the hashes of a share of them."""
        for number, (name, entry) in enumerate(sorted(self.facts["files"].items())):
            file = self.path / name
            size = regular_size(file)
            if size != entry["bytes"]:
                raise CheckpointError(f"{file} is truncated: {size} of {entry['bytes']} bytes")
            if number % ranks == rank and hash_of(file) != entry["sha256"]:
                raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")


class WholeKind(Mapping[str, Tensor]):
    """All fragments of a kind, by name: whole, or in part."""

    def __init__(self, saved: SavedRun, kind: str) -> None:
        self._saved, self._kind = saved, kind
        self._sizes = {
            name: max(first + length for first, length, _, _ in spans)
            for (k, name), spans in saved._spans.items()
            if k == kind
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sizes:
            raise CheckpointError(f"{self._saved.path} holds no {self._kind} of {name!r}")
        return self._saved._read(self._kind, name, 0, self._sizes[name])

    def size(self, name: str) -> int:
        """The number of elements saved under a name; 0 if there are none."""
        return self._sizes.get(name, 0)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of the elements under a name; raises CheckpointError where any is missing."""
        return self._saved._read(self._kind, name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
