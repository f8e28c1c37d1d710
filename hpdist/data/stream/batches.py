"""An endless, resumable stream of this rank's slice of each global batch.

Epochs are laid end to end: epoch e is the rows permuted by (seed, e), and global batch k is rows
[k * global_batch, (k + 1) * global_batch) of that endless sequence. So nothing is dropped, nothing
is repeated within an epoch, and the rows of a global batch depend on neither rank nor world size.
The position in the sequence is one integer, the same on every rank.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast, overload

import numpy as np
import torch

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode import InputSpec
from hpdist.data.sources import Int64Array, LabeledRows, StreamedRows, TableRows
from hpdist.errors import DataError

BatchT = TypeVar("BatchT", LabeledBatch, UnlabeledBatch)
_Item: TypeAlias = "tuple[LabeledBatch | UnlabeledBatch, int | None] | BaseException"

_LABELED_ORDER = 0x1ABE1ED  # two sets of as many rows must not be walked in the same order
_UNLABELED_ORDER = 0xDA7A
_QUEUED_BATCHES = 2
_JOIN_SECONDS = 10.0  # a thread that hangs in a network read must not hold up the exit


class BatchStream(Generic[BatchT]):
    """Iterates for ever over this rank's slice of each global batch, decoded ahead in a thread.

    Rank r of W gets rows [r * global_batch // W, (r + 1) * global_batch // W) of every batch.
    `position` counts the rows that the delivered global batches consumed. Resuming costs O(1) for a
    table; for a stream it costs O(rows), since the epoch's rows up to the position are read again,
    undecoded. Every rank reads the whole of a stream, and mixes only rows within `shuffle_window`
    of each other: rows sorted by class need shuffling once on disk. Errors of the thread are raised
    by `next`.
    """

    @overload
    def __init__(
        self: BatchStream[LabeledBatch],
        rows: LabeledRows,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        spec: InputSpec,
        position: int = 0,
    ) -> None: ...

    @overload
    def __init__(
        self: BatchStream[UnlabeledBatch],
        rows: TableRows | StreamedRows,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        spec: InputSpec,
        position: int = 0,
    ) -> None: ...

    def __init__(
        self,
        rows: TableRows | StreamedRows,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        spec: InputSpec,
        position: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self._source = rows
        self._spec = spec
        self._global_batch = global_batch
        self._slice = (rank * global_batch // world_size, (rank + 1) * global_batch // world_size)
        self._seed = seed
        self._position = position
        self._rows = None if isinstance(rows, StreamedRows) else len(rows)
        self._error: BaseException | None = None
        self._closed = False
        self._queue: queue.Queue[_Item] = queue.Queue()
        self._stop: weakref.finalize[Any, Any] | None = None

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Give the next batch.

        Raises DataError when rows cannot be read or decoded, and then again on every call.
        """
        if self._closed:
            raise RuntimeError("the BatchStream is closed")
        if self._error is not None:
            raise self._error
        if self._stop is None:
            self._start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, self._rows = item
        self._position += self._global_batch
        return cast(BatchT, batch)

    @property
    def epoch(self) -> int:
        """How many times the delivered batches have been through all rows."""
        return self._position // self._rows if self._rows else 0

    def state_dict(self) -> dict[str, int | None]:
        """Save the position in rows, and what the sequence depends on.

        The same on every rank, whatever their number. `rows` is None in a stream's first epoch.
        """
        return {
            "position": self._position,
            "seed": self._seed,
            "rows": self._rows,
            "global_batch": self._global_batch,
        }

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continue from a saved position, on any number of ranks.

        Raises DataError that names what differs when the sequence would not be the saved one.
        """
        ours = self.state_dict()
        for key in ("seed", "global_batch", "rows"):
            saved, now = state[key], ours[key]
            if saved != now and not (key == "rows" and None in (saved, now)):
                raise DataError(
                    f"{self._source.name}: cannot continue: the saved stream has {key} {saved}, "
                    f"this one {now}; restore the settings and data of that run, or start a new one"
                )
        self._halt()
        self._error = None
        self._position = cast(int, state["position"])
        self._rows = state["rows"] if ours["rows"] is None else ours["rows"]

    def close(self) -> None:
        """Stop the thread and wait for it; also done at exit and when the stream is collected."""
        self._halt()
        self._closed = True

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

    def _start(self) -> None:
        """Start the thread, which must hold no reference to self, or self is never collected."""
        cuda = torch.cuda.current_device() if torch.cuda.is_available() else None
        loader = _Loader(
            self._source, self._spec, self._seed, self._rows, self._global_batch, self._slice, cuda
        )
        self._queue = queue.Queue(_QUEUED_BATCHES)
        stopping = threading.Event()
        arguments = (loader, self._position, self._queue, stopping)
        thread = threading.Thread(target=_produce, args=arguments, name="hpdist-data", daemon=True)
        self._stop = weakref.finalize(self, _finish, thread, self._queue, stopping)
        thread.start()


def _produce(
    loader: _Loader, position: int, batches: queue.Queue[_Item], stopping: threading.Event
) -> None:
    """Load batches into the queue until told to stop; an error is the last item."""
    try:
        loader.open()
        while not stopping.is_set():
            batches.put(loader.load(position))
            position += loader.global_batch
    except BaseException as error:  # `next` raises it in the consumer's thread
        batches.put(error)


def _finish(
    thread: threading.Thread, batches: queue.Queue[_Item], stopping: threading.Event
) -> None:
    """Stop the thread: once the queue is empty, what it still puts there cannot block it."""
    stopping.set()
    while not batches.empty():
        batches.get_nowait()
    if thread is not threading.current_thread():  # the collector may run in any thread
        thread.join(_JOIN_SECONDS)


@dataclass
class _Loader:
    """Reads and decodes one rank's slice of a global batch."""

    source: TableRows | StreamedRows
    spec: InputSpec
    seed: int
    rows: int | None
    global_batch: int
    slice: tuple[int, int]
    cuda: int | None
    reader: _Reader = field(init=False)

    def open(self) -> None:
        if self.cuda is not None:  # else page-locking would make a context on GPU 0
            torch.cuda.set_device(self.cuda)
        if isinstance(self.source, StreamedRows):
            self.reader = _StreamReader(self.source, self.seed, self.rows)
        else:
            self.reader = _TableReader(self.source, self.seed)

    def load(self, position: int) -> tuple[LabeledBatch | UnlabeledBatch, int | None]:
        """Load the batch at a position; also the rows of an epoch, as far as known after it."""
        first, last = (position + offset for offset in self.slice)
        values, ids, labels = self.reader.read(first, last, position + self.global_batch)
        pin = self.cuda is not None
        inputs = self.spec.decode_rows(values, ids.tolist(), self.source.name, pin)
        if labels is None:
            return UnlabeledBatch(inputs, _tensor(ids, pin)), self.reader.rows
        return LabeledBatch(inputs, _tensor(labels, pin), _tensor(ids, pin)), self.reader.rows


def _tensor(array: Int64Array, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin else tensor


class _Reader(Protocol):
    """Reads rows by their place in the endless sequence."""

    rows: int | None
    """Rows of an epoch, where known."""

    def read(
        self, first: int, last: int, end: int
    ) -> tuple[list[Any], Int64Array, Int64Array | None]:
        """Read values, ids and labels at places [first, last); the global batch ends at `end`."""
        ...


class _TableReader:
    """Random access: only this rank's rows are read."""

    def __init__(self, source: TableRows, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.rows: int | None = len(source)
        self._order: tuple[int, Int64Array] = (-1, np.empty(0, np.int64))

    def read(
        self, first: int, last: int, end: int
    ) -> tuple[list[Any], Int64Array, Int64Array | None]:
        at = np.arange(first, last)
        epochs, offsets = np.divmod(at, len(self.source))
        positions = np.empty(len(at), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            positions[here] = self._permutation(epoch)[offsets[here]]
        labels = self.source.labels[positions] if isinstance(self.source, LabeledRows) else None
        return self.source.read(positions), self.source.ids[positions], labels

    def _permutation(self, epoch: int) -> Int64Array:
        if self._order[0] != epoch:
            tag = _LABELED_ORDER if isinstance(self.source, LabeledRows) else _UNLABELED_ORDER
            generator = np.random.default_rng([self.seed, tag, epoch])
            self._order = (epoch, generator.permutation(len(self.source)))
        return self._order[1]


class _StreamReader:
    """Sequential access: every rank walks the same shuffled rows and keeps its own.

    One row is read ahead, so that the end of an epoch is known as soon as its last row is used.
    """

    def __init__(self, source: StreamedRows, seed: int, rows: int | None) -> None:
        self.source = source
        self.seed = seed
        self.rows = rows
        self._place = -1  # of the row read ahead; nothing is open yet

    def read(
        self, first: int, last: int, end: int
    ) -> tuple[list[Any], Int64Array, Int64Array | None]:
        if self._place < 0:
            self._open(first // self.rows if self.rows else 0)
        kept = []
        while self._place < end:
            if first <= self._place < last:
                kept.append(self._ahead)
            self._advance()
        ids = np.asarray([row for row, _ in kept], dtype=np.int64)
        return [value for _, value in kept], ids, None

    def _open(self, epoch: int) -> None:
        """Stand before the first row of an epoch."""
        generator = np.random.default_rng([self.seed, _UNLABELED_ORDER, epoch])
        self._epoch = epoch
        self._walk = _shuffled(self.source.scan(), self.source.buffer_rows, generator)
        self._count = 0
        self._place = epoch * (self.rows or 0)
        first = next(self._walk, None)
        if first is None:
            raise DataError(f"{self.source.name}: holds no rows")
        self._ahead = first

    def _advance(self) -> None:
        self._place += 1
        self._count += 1
        following = next(self._walk, None)
        if following is not None:
            self._ahead = following
            return
        if self.rows not in (None, self._count):
            raise DataError(
                f"{self.source.name}: epoch {self._epoch} had {self._count} rows, an earlier one "
                f"{self.rows}; the dataset must not change during a run"
            )
        self.rows = self._count
        self._open(self._epoch + 1)


def _shuffled(
    rows: Iterator[tuple[int, Any]], buffer_rows: int, generator: np.random.Generator
) -> Iterator[tuple[int, Any]]:
    """Draw each row from a buffer of the next `buffer_rows`, as `datasets` does."""
    buffer: list[tuple[int, Any]] = []
    for row in rows:
        if len(buffer) < buffer_rows:
            buffer.append(row)
            continue
        at = int(generator.integers(buffer_rows))
        yield buffer[at]
        buffer[at] = row
    for at in generator.permutation(len(buffer)).tolist():
        yield buffer[at]
