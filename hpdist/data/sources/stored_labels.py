"""Stored pseudo-labels of the unlabelled rows, joined by id and mapped into memory.

    stored = open_stored_labels(["labels/a", "labels/b"], unlabeled, classes)
    stored.take(ids)     # means over the folders: probabilities, confidence, agreement

What the folders hold is laid out once by id, in the cache of `datasets`: 8 bytes for each row and
folder, and 2 more for each class where there are probabilities. Processes of a machine share these
files and read only the pages of the rows that they need.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hpdist.data.batch import StoredTensors
from hpdist.data.sources.label_files import (
    WHERE,
    FloatArray,
    LabelFolder,
    Piece,
    find_labels,
    whole_count,
)
from hpdist.data.sources.label_privacy import read_spent
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled
from hpdist.data.stream.permute import Int64Array
from hpdist.errors import DataError, one_line
from hpdist.messages.progress import working

_VERSION = 1  # of the layout
_FILES = {"labels": np.int32, "confidence": np.float32, "probabilities": np.float16}


@dataclass(frozen=True, eq=False)
class _Folder:
    """One folder's labels by id; nothing is read before it is asked for."""

    labels: Any  # int32 [rows]; -1 where there is none
    confidence: Any  # fp32 [rows]
    probabilities: Any | None  # fp16 [rows, classes]

    def predictions(self, ids: Int64Array, classes: int) -> tuple[FloatArray, FloatArray]:
        """Give distributions over the classes, 0 without a label, and confidences of labels."""
        labels = np.asarray(self.labels[ids], np.int64)
        there = labels >= 0
        if self.probabilities is None:
            found = np.zeros((len(ids), classes), np.float32)
            found[there, labels[there]] = 1
            return found, np.asarray(self.confidence[ids], np.float32) * there
        found = np.asarray(self.probabilities[ids], np.float32) * there[:, None]
        found /= np.maximum(found.sum(axis=1, keepdims=True), 0.5)  # fp16 rounds
        return found, found.max(axis=1)


@dataclass(frozen=True, eq=False)
class StoredLabels:
    """The labels of several folders for the same rows."""

    folders: tuple[_Folder, ...]
    classes: int
    content: str
    """A digest of what the folders held, which a run that goes on must find again."""
    count: int
    """Rows that have a label from at least one folder."""
    privacy: tuple[dict[str, Any], ...] = ()
    """What the folders that were voted privately say that this cost, each with its `folder`."""

    def take(self, ids: Int64Array) -> StoredTensors:
        """Give the means over the folders that label a row; zeros where none does."""
        found = [folder.predictions(ids, self.classes) for folder in self.folders]
        labeled = np.stack([q.any(axis=1) for q, _ in found]).astype(np.float32)  # [folders, rows]
        number = np.maximum(labeled.sum(axis=0), 1)
        mean = sum(q for q, _ in found) / number[:, None]
        best = mean.argmax(axis=1)[:, None]
        agrees = np.stack([q.argmax(axis=1) == best[:, 0] for q, _ in found]) * labeled
        sure = [
            confidence * agree
            if folder.probabilities is None
            else np.take_along_axis(q, best, axis=1)[:, 0]
            for folder, (q, confidence), agree in zip(self.folders, found, agrees, strict=True)
        ]
        confidence = np.asarray(sum(sure) / number, np.float32)
        return StoredTensors(
            probabilities=torch.from_numpy(np.ascontiguousarray(mean, np.float32)),
            confidence=torch.from_numpy(confidence),
            agreement=torch.from_numpy(np.asarray(agrees.sum(axis=0) / number, np.float32)),
        )


def lay_out_labels(paths: Sequence[str], rows: AnyUnlabeled, names: Sequence[str]) -> None:
    """Lay out the folders' labels in this machine's cache, unless that has been done.

    `names` are those of the run's classes. Raises DataError that names what does not fit: a row
    that is not there or has changed, a class, a row that is labelled twice.
    """
    folders = [find_labels(path, rows, rows.name) for path in paths]
    target = _target(folders, rows, names)
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        count = whole_count(rows)
        anywhere = np.zeros(count, bool)
        with working(f"reading {WHERE}", count * len(folders), "rows") as work:
            for number, folder in enumerate(folders):
                anywhere |= _write(folder, rows, names, temporary / str(number), work)
        (temporary / "count.json").write_text(json.dumps(int(anywhere.sum())))
        os.replace(temporary, target)
    except OSError as error:
        if not target.exists():  # else another process was faster
            raise DataError(
                f"{WHERE}: the labels cannot be laid out in {target.parent}: {one_line(error)}; "
                "set HF_HOME to a disk with more room"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_stored_labels(
    paths: Sequence[str], rows: AnyUnlabeled, names: Sequence[str]
) -> StoredLabels:
    """Map what `lay_out_labels` has laid out. Raises DataError where no used row has a label."""
    folders = [find_labels(path, rows, rows.name) for path in paths]
    target = _target(folders, rows, names)
    try:
        count = int(json.loads((target / "count.json").read_text()))
        opened = tuple(_open(target / str(number), f) for number, f in enumerate(folders))
    except (OSError, ValueError) as error:
        raise DataError(f"{WHERE}: cannot read {target}: {one_line(error)}") from error
    if not count:
        raise DataError(f"{WHERE}: {', '.join(paths)}: no row of {rows.name} has a label there")
    spent = [(folder.path, read_spent(folder.path)) for folder in folders]
    privacy = tuple({"folder": str(path), **one} for path, one in spent if one is not None)
    return StoredLabels(opened, len(names), _digest(folders, rows, names), count, privacy)


def _digest(folders: Sequence[LabelFolder], rows: AnyUnlabeled, names: Sequence[str]) -> str:
    facts = [_VERSION, whole_count(rows), list(names), [folder.content for folder in folders]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _target(folders: Sequence[LabelFolder], rows: AnyUnlabeled, names: Sequence[str]) -> Path:
    """Name the place of the layout: another one as soon as any file or any row's place differs."""
    times = [[str(f), f.stat().st_mtime_ns] for folder in folders for f in folder.files]
    index = getattr(rows, "index", None)
    facts = [_digest(folders, rows, names), times, index and index.record()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_CACHE_HOME, "hpdist", "labels", key)


def _write(
    folder: LabelFolder, rows: AnyUnlabeled, names: Sequence[str], prefix: Path, work: Any
) -> Any:
    """Lay out one folder by id; give which rows have a label, bool [rows]."""
    count = whole_count(rows)
    arrays = {
        name: np.lib.format.open_memmap(
            prefix.with_suffix(f".{name}.npy"), "w+", dtype, _shape(name, count, len(names))
        )
        for name, dtype in _FILES.items()
        if name != "probabilities" or folder.soft
    }
    labels = arrays["labels"]
    labels[:] = -1
    labeled = np.zeros(count, bool)
    for piece in folder.read(rows, names):
        _check_once(folder, piece, labeled)
        labeled[piece.ids] = True
        labels[piece.ids] = piece.labels
        arrays["confidence"][piece.ids] = piece.confidence
        if piece.probabilities is not None:
            arrays["probabilities"][piece.ids] = piece.probabilities
        work.add(len(piece.ids))
    found = np.asarray(labels) >= 0
    for array in arrays.values():
        array.flush()
    return found


def _check_once(folder: LabelFolder, piece: Piece, labeled: Any) -> None:
    unique, counts = np.unique(piece.ids, return_counts=True)
    twice = [*unique[counts > 1], *piece.ids[labeled[piece.ids]]]
    if twice:
        raise DataError(f"{WHERE}: {folder.path}: id {twice[0]} occurs twice; each row once")


def _shape(name: str, count: int, classes: int) -> tuple[int, ...]:
    return (count, classes) if name == "probabilities" else (count,)


def _open(prefix: Path, folder: LabelFolder) -> _Folder:
    arrays = {
        name: np.load(prefix.with_suffix(f".{name}.npy"), mmap_mode="r", allow_pickle=False)
        for name in _FILES
        if name != "probabilities" or folder.soft
    }
    return _Folder(arrays["labels"], arrays["confidence"], arrays.get("probabilities"))
