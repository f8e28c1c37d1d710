"""What one process found of the unlabelled files, on every rank; its row groups once on each host.

Most of an index is a number for each row group. The first process of each host writes these to a
file without a name, which all of the host map; where no file can be written, every rank has a copy.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from hpdist.data.decode.stored_values import Column
from hpdist.data.files.named_files import PathRule
from hpdist.data.sources.unlabeled import DatasetIndex, DatasetIndexes
from hpdist.data.stream.index import Counts, Index
from hpdist.distributed.collectives import all_reduce_max, gathered, run_on_main, world_size

_PIECE = 1 << 24  # bytes that are sent at a time

_log = logging.getLogger("hpdist.data")


@dataclass(frozen=True)
class _Described:
    """A part of a set, but for the rows of its row groups."""

    header: str
    groups: int
    dtype: str
    column: Column
    columns: tuple[str, ...]
    recorded: list[list[Any]] | None
    rule: PathRule


def share_index(scan: Callable[[], DatasetIndex]) -> DatasetIndex:
    """Call `scan` on rank 0, and give all ranks what it found.

    Collective: every rank must call. Raises the HpdistError of `scan` on all.
    """
    if world_size() == 1 or dist.get_backend() == "fake":  # a rehearsal's backend has no others
        return scan()
    found: DatasetIndex = []

    def described() -> list[_Described | None]:
        found.extend(scan())
        return [_described(part) for part in found]

    shared: DatasetIndex = []
    for number, part in enumerate(run_on_main(described)):
        if part is None:
            shared.append(None)
            continue
        own = found[number] if found else None
        numbers = None if own is None else own.index.rows
        rows = _once_a_host(numbers, part.groups, np.dtype(part.dtype))
        index = Index.from_header(part.header, rows)
        shared.append(DatasetIndexes(index, part.column, part.columns, part.recorded, part.rule))
    return shared


def _described(part: DatasetIndexes | None) -> _Described | None:
    if part is None:
        return None
    rows = part.index.rows
    return _Described(
        part.index.header(),
        len(rows),
        rows.dtype.str,
        part.column,
        part.columns,
        part.recorded,
        part.rule,
    )


def _once_a_host(own: Counts | None, count: int, dtype: np.dtype[Any]) -> Counts:
    """Give every rank the numbers that rank 0 has, [count]: mapped, or else a copy."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    path = ""
    error: Exception | None = None
    file: IO[bytes] | None = None
    if local == 0:
        try:
            handle, path = tempfile.mkstemp(prefix="hpdist-index-")
            file = os.fdopen(handle, "wb")
        except OSError as raised:
            error = raised
    error = _received(own, count * dtype.itemsize, file) or error
    paths = gathered(path)
    mapped: Counts | None = None
    try:
        if error is None:
            mapped = np.memmap(paths[_rank() - local], dtype, "r", shape=(count,))
    except (OSError, ValueError) as raised:
        error = raised
    failed = all_reduce_max(int(error is not None))  # and everyone has mapped it
    if path:
        Path(path).unlink(missing_ok=True)
    if not failed and mapped is not None:
        return mapped
    if error is not None:
        _log.warning(
            "the row groups of data.unlabeled cannot be kept in a file in %s (%s): every process "
            "has its own copy of %d bytes; free space there, or name another folder in TMPDIR",
            tempfile.gettempdir(),
            error,
            count * dtype.itemsize,
        )
    copy = np.empty(count, dtype) if own is None else own
    _send(copy.view(np.uint8))
    return copy


def _received(own: Counts | None, size: int, file: IO[bytes] | None) -> Exception | None:
    """Send what rank 0 has to all, who write it to `file`, or drop it; why it was not written."""
    sent = None if own is None else own.view(np.uint8)
    error: Exception | None = None
    for start in range(0, size, _PIECE):
        stop = min(size, start + _PIECE)
        piece = np.empty(stop - start, np.uint8) if sent is None else sent[start:stop]
        _send(piece)
        try:
            if file is not None and error is None:
                file.write(piece.data)
        except OSError as raised:  # the others are waiting for the rest
            error = raised
    try:
        if file is not None:
            file.close()
    except OSError as raised:
        error = error or raised
    return error


def _send(values: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Send the bytes of rank 0 to all, into `values`."""
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        tensor = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.broadcast(tensor, src=0)
        if _rank() > 0:
            piece[:] = tensor.cpu().numpy()


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0
