"""Writes checkpoints in the background, such that a process may die at any instant.

Each rank writes its own shard under a temporary name, and a note when it is safe on disk. The first
rank waits for all notes, writes the manifest, and renames the folder: only then the checkpoint
exists. Writing needs no collective, so it cannot interfere with the training's; a rank's failure
is reported when the next checkpoint is due, by a collective, since a full disk may hold no note.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hpdist.checkpoint.fragment_index import FragmentIndex, key_of
from hpdist.checkpoint.manifest import (
    COMMON,
    MANIFEST,
    VERSION,
    digest_of,
    file_name,
    folder_name,
    hash_of,
    list_checkpoints,
)
from hpdist.checkpoint.reader import remove
from hpdist.distributed.collectives import reports, run_on_main
from hpdist.distributed.fragments import Fragment
from hpdist.errors import CheckpointError, why_not_written

_POLL = 0.02  # seconds


class CheckpointWriter:
    """Writes one checkpoint at a time. Collective: every rank must construct it.

    A write that fails (the disk is full, the folder is gone) leaves the older checkpoints
    unchanged; `problems` reports it, and the next `save` tries again.

    Args:
        folder: Of the run's checkpoints.
        rank: This rank.
        ranks: The number of ranks.
        keep: How many checkpoints are kept.
        background: Whether `save` returns once the state is copied.
    """

    def __init__(
        self, folder: Path, rank: int, ranks: int, *, keep: int, background: bool = True
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._ranks = ranks
        self._keep = keep
        self._background = background
        self._token = run_on_main(lambda: secrets.token_hex(4))
        self._count = 0
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []
        self._failure: str | None = None  # of the latest write
        self._others: dict[int, str] = {}  # the known failures of other ranks
        self.waited = 0.0
        """Seconds that the training has waited for `save` and `finish`."""
        if rank == 0:
            for left in folder.glob(".writing-*"):  # of a process that was killed
                with suppress(OSError):  # it does no harm
                    remove(left)

    def save(
        self,
        step: int,
        fragments: Mapping[str, Sequence[Fragment]],
        common: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state and begin to write it, after waiting for an unfinished write.

        `fragments` are this rank's, by kind; `common` and `facts` (JSON) are equal on every rank.
        `before` writes what must be safe before the checkpoint exists. Collective: every rank must
        call.
        """
        start = time.monotonic()
        self._settle()
        own = {
            key_of(kind, f.name, f.start): _copy(f.values)
            for kind, items in fragments.items()
            for f in items
        }
        shared = {name: _copy(value) for name, value in common.items()} if self._rank == 0 else {}
        self._count += 1
        temporary = self._folder / f".writing-{step:08d}-{self._token}-{self._count}"
        self._failure, self._others = None, {}
        self._thread = threading.Thread(
            target=self._write,
            args=(temporary, step, own, shared, dict(facts), before),
            name="hpdist-checkpoint",
            daemon=True,
        )
        self._thread.start()
        if not self._background:
            self._settle()
        self.waited += time.monotonic() - start

    def problems(self) -> list[str]:
        """What went wrong since the last call, as far as this rank knows."""
        found, self._problems = self._problems, []
        return found

    def finish(self) -> None:
        """Wait until the latest checkpoint is complete. Collective: every rank must call.

        Raises CheckpointError on all ranks if it is not.
        """
        start = time.monotonic()
        self._settle()
        failures = reports(self._failure)
        if self._others:
            failures.pop(0, None)  # it only waited for them
        reasons = "; ".join(f"rank {rank}: {why}" for rank, why in failures.items())
        self.waited += time.monotonic() - start
        if reasons:
            self.problems()  # part of the error already
            error = CheckpointError(
                f"the latest checkpoint could not be written: {reasons}; make room, and start "
                "again: the run goes on from the one before"
            )
            error.everywhere = True
            raise error

    def close(self, seconds: float) -> None:
        """Wait some time for this rank's part of the latest checkpoint, without communication."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _settle(self) -> None:
        """Wait for the latest write; if a rank's part will not come, the first need not wait."""
        if self._rank != 0:
            self._join()
        failures = reports(self._failure)
        self._others = {rank: reason for rank, reason in failures.items() if rank != 0}
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self,
        temporary: Path,
        step: int,
        own: dict[str, Tensor],
        shared: dict[str, Tensor],
        facts: dict[str, Any],
        before: Callable[[], None],
    ) -> None:
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            before()
            self._write_own(temporary, own, shared)
            if self._rank == 0:
                self._complete(temporary, step, facts)
        except (OSError, SafetensorError, CheckpointError) as error:
            self._failure = why_not_written(error, self._folder)
            self._problems.append(
                f"rank {self._rank}: the checkpoint of step {step} could not be written: "
                f"{self._failure}"
            )
            self._make_room(temporary)

    def _write_own(
        self, temporary: Path, own: dict[str, Tensor], shared: dict[str, Tensor]
    ) -> None:
        files = [_write_tensors(temporary / file_name(self._rank), own)]
        if self._rank == 0:
            files.append(_write_tensors(temporary / COMMON, shared))
        path = temporary / f"note-{self._rank:05d}.json"
        index = FragmentIndex()
        for key, values in own.items():
            index.add_key(key, len(values), self._rank)
        note = {"files": dict(files), "fragments": index.encoded()}
        _write_bytes(path.with_suffix(".tmp"), json.dumps(note).encode())
        os.replace(path.with_suffix(".tmp"), path)

    def _complete(self, temporary: Path, step: int, facts: dict[str, Any]) -> None:
        """Wait for every rank's note, write the manifest, and rename the folder."""
        paths = [temporary / f"note-{rank:05d}.json" for rank in range(self._ranks)]
        files: dict[str, Any] = {}
        index = FragmentIndex()
        for rank, path in enumerate(paths):
            note = self._await(path, rank)
            files |= note["files"]
            index.include(note["fragments"], self._ranks)
        manifest = {
            "version": VERSION,
            "step": step,
            "world_size": self._ranks,
            "files": files,
            "fragments": index.encoded(),
            **facts,
        }
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        text = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=2)
        _write_bytes(temporary / MANIFEST, text.encode())
        for path in paths:
            path.unlink()
        _sync_folder(temporary)
        final = self._folder / folder_name(step)
        replaced = self._folder / f".writing-replaced-{self._token}-{self._count}"
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        _sync_folder(self._folder)
        with suppress(FileNotFoundError):
            remove(replaced)
        self._retain()

    def _retain(self) -> None:
        """Remove checkpoints beyond those to keep; links do not count."""
        own = [path for path in list_checkpoints(self._folder) if not path.is_symlink()]
        try:
            for path in own[self._keep :]:
                remove(path)
        except OSError as error:
            self._problems.append(f"an old checkpoint could not be removed: {error}")

    def _await(self, file: Path, rank: int) -> dict[str, Any]:
        """The content of a rank's note, once its files are safe."""
        while not file.exists():
            if rank in self._others:
                raise CheckpointError(f"rank {rank} failed: {self._others[rank]}")
            if not file.parent.exists():
                raise CheckpointError(f"{file.parent} is gone")
            time.sleep(_POLL)
        noted: dict[str, Any] = json.loads(file.read_text())
        return noted

    def _make_room(self, temporary: Path) -> None:
        """Remove the parts of a checkpoint that cannot be completed."""
        if self._rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                (temporary / file_name(self._rank)).unlink()


def _copy(values: Tensor) -> Tensor:
    """A copy on the CPU; of bf16 in fp32, which is exact and which every engine can load."""
    copied = values.detach().cpu()
    if copied.dtype == torch.bfloat16:
        return copied.float()
    return copied.clone() if copied.data_ptr() == values.data_ptr() else copied


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    save_file(tensors, path)
    # safetensors makes its files readable by the owner only; they get the mode of other files.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": hash_of(path)}


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
