"""Checkpoints in fragments: the same files however a run is sharded, for any number of ranks.

`writer` writes them; here they are found, verified and read.

    step-00000100/
      manifest.json             counters, topology, size and SHA-256 of every file, and which has
                              which fragments; written last
      rank-00000.safetensors    the rank's part of master weights, teacher, optimizer and
                              algorithm state
      common.safetensors        what is equal on every rank: buffers, algorithm state

Nothing is pickled. A checkpoint is written under a temporary name and renamed when complete. A rank
opens the files whose fragments it reads, and no others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hpdist.checkpoint.fragment_index import FragmentIndex, key_of
from hpdist.checkpoint.manifest import (
    COMMON,
    MANIFEST,
    LaterFormatError,
    check_types,
    file_name,
    hash_of,
    list_checkpoints,
    rank_of,
    read_manifest,
    regular_size,
    step_of,
)
from hpdist.distributed.collectives import reports, run_on_main, world_size
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
        errors = list(reports(error).values())
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

    On as many ranks as have written it, each verifies its own. Raises CheckpointError if a file
    that is verified here is missing or damaged, or the checkpoint is of a later format.
    """

    def __init__(self, path: Path, rank: int = 0, ranks: int = 1) -> None:
        self.path = path
        self.facts = read_manifest(path)
        self._files: dict[str, Any] = {}
        self._stored_names: dict[tuple[str, str], str] = {}
        self._check_size(COMMON)
        try:
            self._verify(rank, ranks)
            self.common = load_file(path / COMMON)
            self._index = self._read_index()
            self._forget_wrappers()
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def kinds(self) -> set[str]:
        """The kinds of fragments that it holds."""
        return self._index.kinds()

    def holds(self, kind: str, name: str) -> bool:
        """Whether it has fragments of a kind for a parameter."""
        return self._index.holds(kind, name)

    def read(self, kind: str, like: Fragment) -> Tensor:
        """The saved elements at a fragment's place, from any number of files."""
        return self.read_range(kind, like.name, like.start, like.start + len(like.values))

    def whole(self, kind: str) -> WholeKind:
        """Every parameter's saved elements, read on access."""
        return WholeKind(self, kind, self._index)

    def read_range(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The saved elements from `start` to `stop` of a name, from any number of files.

        Raises CheckpointError if any is missing.
        """
        parts = [torch.empty(0)][: start == stop]  # a rank may own nothing of a parameter
        at = start
        for first, length, rank in self._index.spans(kind, name, start, stop):
            low, high = max(at, first), min(stop, first + length)
            if low != at:
                break
            key = key_of(kind, self._stored_names.get((kind, name), name), first)
            parts.append(self._elements(file_name(rank), key, low - first, high - first))
            at = high
        if at < stop:
            raise CheckpointError(f"{self.path}: {kind} of {name!r} lacks elements {at} to {stop}")
        return torch.cat(parts)

    def _elements(self, file: str, key: str, start: int, stop: int) -> Tensor:
        """Read a part of one fragment."""
        try:
            values: Tensor = self._open(file).get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
        if len(values) != stop - start:
            raise CheckpointError(f"{self.path / file}: {key} is shorter than the manifest says")
        return values

    def _open(self, file: str) -> Any:
        """Open a file once: its header has an entry for every fragment."""
        if file not in self._files:
            self._check_size(file)
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]

    def _read_index(self) -> FragmentIndex:
        """Find where the fragments are; without a list in the manifest, from all files' headers."""
        index, files = FragmentIndex(), self.facts["files"]
        if self.facts.get("fragments") is not None:
            try:
                index.include(self.facts["fragments"], len(files) - 1)
            except ValueError as error:
                raise CheckpointError(f"{self.path / MANIFEST} is damaged: {error}") from error
            return index
        for file in files:  # an earlier version wrote it
            if file != COMMON:
                reader = self._open(file)
                for key in reader.keys():  # noqa: SIM118 (not a dict)
                    index.add_key(key, reader.get_slice(key).get_shape()[0], rank_of(file))
        return index

    def _forget_wrappers(self) -> None:
        """Remove from all names the segments of wrappers that earlier versions wrote."""
        under_ddp = self.facts["world_size"] > 1
        for kind in self.kinds() - {"algorithm"}:
            stored = {name: name for name in self._index.names(kind)}
            plain = with_plain_names(stored, under_ddp=under_ddp)
            if any(name != old for name, old in plain.items()):
                self._index.rename(kind, {old: name for name, old in plain.items()})
                self._stored_names |= {(kind, name): old for name, old in plain.items()}
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
        """Check the sizes, the hashes and the headers of a share of the files."""
        for name, entry in self.facts["files"].items():
            if rank_of(name) % ranks == rank:
                self._check_size(name)
                file = self.path / name
                if hash_of(file) != entry["sha256"]:
                    raise CheckpointError(
                        f"{file} is damaged: its SHA-256 differs from the manifest's"
                    )
                if name != COMMON:
                    self._open(name)

    def _check_size(self, name: str) -> None:
        """Raise CheckpointError unless a file is one of the checkpoint's, and as long as it was."""
        file, entry = self.path / name, self.facts["files"].get(name)
        if entry is None:
            raise CheckpointError(f"{self.path / MANIFEST} is damaged: it names no {name}")
        size = regular_size(file)
        if size != entry["bytes"]:
            raise CheckpointError(f"{file} is truncated: {size} of {entry['bytes']} bytes")


class WholeKind(Mapping[str, Tensor]):
    """All fragments of a kind, by name: whole, or in part."""

    def __init__(self, saved: SavedRun, kind: str, index: FragmentIndex) -> None:
        self._saved, self._kind = saved, kind
        self._sizes = {name: index.size(kind, name) for name in index.names(kind)}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sizes:
            raise CheckpointError(f"{self._saved.path} holds no {self._kind} of {name!r}")
        return self.read(name, 0, self._sizes[name])

    def size(self, name: str) -> int:
        """The number of elements saved under a name; 0 if there are none."""
        return self._sizes.get(name, 0)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of the elements under a name; raises CheckpointError where any is missing."""
        return self._saved.read_range(self._kind, name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
