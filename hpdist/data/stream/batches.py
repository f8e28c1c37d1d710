"""An endless, resumable stream of this rank's slice of each global batch, decoded ahead.

Which rows a global batch holds depends on neither rank nor world size, and the position, one
integer, is the same on every rank. So nothing is gathered to save it, and nothing is dealt out
anew to resume on another number of ranks.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch

from hpdist.data.batch import BadRow, LabeledBatch, StoredTensors, UnlabeledBatch
from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.encoded import Array, Unreadable
from hpdist.data.decode.spec import InputSpec
from hpdist.data.stream.functions import Values
from hpdist.data.stream.reader import Reader, Rows
from hpdist.data.structures import map_arrays
from hpdist.errors import DataError

BatchT = TypeVar("BatchT", LabeledBatch, UnlabeledBatch)

_QUEUED_BATCHES = 2
_GIVE_UP = 0.2  # seconds between two looks at whether to wait on
_JOIN_SECONDS = 3.0  # a thread that hangs in a read must not hold up the exit


class RowSource(Protocol):
    """A set of rows that can be read in any order that a seed chooses."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def values(self, rows: Rows) -> Values:
        """The stored values of rows, and which of them are left out."""
        ...

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Start to read; `order` and `resume` are those of the stream that goes on."""
        ...

    def changes(self) -> str:
        """Say what differs from the stream that goes on."""
        ...


@dataclass(frozen=True)
class _Loaded:
    """A batch, and what its delivery makes known."""

    batch: LabeledBatch | UnlabeledBatch
    rows: int | None  # of an epoch
    resume: dict[str, Any] | None  # the reader's point to go on from, after this batch


_Item: TypeAlias = "_Loaded | BaseException"


class BatchStream(Generic[BatchT]):
    """Iterates for ever over this rank's slice of each global batch, decoded ahead in a thread.

    Rank r of W gets rows [r * global_batch // W, (r + 1) * global_batch // W) of every batch.
    Within an epoch every row comes exactly once; the rows that do not fill the last global batch
    come first in the next one. A row that cannot be used keeps its place and is not `valid`
    (unlabelled), or raises DataError (labelled). Errors of the thread are raised by `next`.

    Args:
        source: Of the rows.
        global_batch: Rows of a step, over all ranks.
        rank: Whose slice to give.
        world_size: Number of ranks.
        seed: Chooses the order.
        spec: How rows are decoded.
        position: Rows of the endless sequence to leave out.
        threads: That decode.
        processes: That decode, in place of threads.
        stored: Gives what is stored of unlabelled rows, by their ids.
    """

    def __init__(
        self,
        source: RowSource,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        spec: InputSpec,
        position: int = 0,
        *,
        threads: int = 1,
        processes: int = 0,
        stored: Callable[[Array], StoredTensors] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self.waited = 0.0
        """Seconds that `next` has waited for the thread."""
        self._source = source
        self._spec = spec
        self._global_batch = global_batch
        self._slice = (rank * global_batch // world_size, (rank + 1) * global_batch // world_size)
        self._seed = seed
        self._decoding = (threads, processes)
        self._stored = stored
        self._position = position
        self._stopping = threading.Event()
        self._reader = source.reader(seed, global_batch, stop=self._stopping)
        self._rows = self._reader.rows
        self._resume: dict[str, Any] | None = None
        self._next: _Loaded | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._queue: queue.Queue[_Item] = queue.Queue()
        self._stop: weakref.finalize[Any, Any] | None = None

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Give the next batch.

        Raises DataError when rows cannot be read, and then again on every call.
        """
        self.prefetch()
        loaded, self._next = cast(_Loaded, self._next), None
        self._rows, self._resume = loaded.rows, loaded.resume
        self._position += self._global_batch
        return cast(BatchT, loaded.batch)

    @property
    def following(self) -> BatchT | None:
        """The batch that `next` will give, if `prefetch` has fetched it; the position stays."""
        return None if self._next is None else cast(BatchT, self._next.batch)

    def prefetch(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for the batch that `next` will give, unless `should_stop`; the position stays.

        Raises what `next` does.
        """
        if self._closed:
            raise RuntimeError("the BatchStream is closed")
        if self._error is not None:
            raise self._error
        if self._next is not None:
            return
        if self._stop is None:
            self._start()
        start = time.monotonic()
        item = self._wait(should_stop)
        self.waited += time.monotonic() - start
        if item is None:
            return
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self._next = item

    def _wait(self, should_stop: Callable[[], bool]) -> _Item | None:
        while not should_stop():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_GIVE_UP)
        return None

    @property
    def epoch(self) -> int:
        """How many times the delivered batches have been through all rows."""
        return self._position // self._rows if self._rows else 0

    def state_dict(self) -> dict[str, Any]:
        """Save the position, what the sequence depends on, and what a reader needs to go on.

        The same on every rank, whatever their number; JSON.
        """
        return {
            "position": self._position,
            "order": self._reader.order(),
            "rows": self._rows,
            "resume": self._resume,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, on any number of ranks.

        Raises DataError that names what differs when the sequence would not be the saved one.
        """
        order = state["order"]
        self._halt()
        self._stopping = threading.Event()
        self._reader = self._source.reader(
            self._seed,
            self._global_batch,
            order=order,
            resume=state["resume"],
            stop=self._stopping,
        )
        self._check_order(order, self._reader.order())
        self._error = self._next = None
        self._position, self._rows, self._resume = state["position"], state["rows"], state["resume"]

    def close(self) -> None:
        """Stop the threads and wait for them; also done at exit and on garbage collection."""
        self._halt()
        self._closed = True

    def _check_order(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if saved == now:
            return
        differing = [key for key in now if saved.get(key) != now[key]]
        if {"fingerprint", "parts", "rows"} & set(differing) and saved.get("seed") == now.get(
            "seed"
        ):
            raise DataError(
                f"{self._source.name}: cannot continue: the data is not that of the saved run: "
                f"{self._source.changes()}; restore it, or start a new run"
            )
        key = differing[0]
        raise DataError(
            f"{self._source.name}: cannot continue: the saved stream has {key} {saved.get(key)}, "
            f"this one {now[key]}; restore the settings and data of that run, or start a new one"
        )

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None
        else:
            self._reader.close()

    def _start(self) -> None:
        """Start the thread, which must hold no reference to self, or self is never collected."""
        cuda = torch.cuda.current_device() if torch.cuda.is_available() else None
        loader = _Loader(
            self._source,
            self._reader,
            self._spec,
            self._global_batch,
            self._slice,
            self._decoding,
            cuda,
            self._stored,
        )
        self._queue = queue.Queue(_QUEUED_BATCHES)
        arguments = (loader, self._position, self._queue, self._stopping)
        thread = threading.Thread(target=_produce, args=arguments, name="hpdist-data", daemon=True)
        self._stop = weakref.finalize(self, _finish, thread, self._queue, self._stopping)
        thread.start()


def _produce(
    loader: _Loader, position: int, batches: queue.Queue[_Item], stopping: threading.Event
) -> None:
    """Load batches into the queue until told to stop; an error is the last item."""
    try:
        with Decoder(loader.spec, *loader.decoding) as decoder:
            loader.enter()
            while not stopping.is_set():
                batches.put(loader.load(position, decoder))
                position += loader.global_batch
    except BaseException as error:  # `next` raises it in the consumer's thread
        batches.put(error)
    finally:
        loader.reader.close()


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

    source: RowSource
    reader: Reader
    spec: InputSpec
    global_batch: int
    slice: tuple[int, int]
    decoding: tuple[int, int]  # threads and processes
    cuda: int | None
    stored: Callable[[Array], StoredTensors] | None

    def enter(self) -> None:
        """Make the thread ready for page-locked memory."""
        if self.cuda is not None:  # else page-locking would make a context on GPU 0
            torch.cuda.set_device(self.cuda)

    def load(self, position: int, decoder: Decoder) -> _Loaded:
        """Load the batch at a position, and have the next one read ahead."""
        start, stop = self.slice
        after = position + self.global_batch
        rows = self.reader.read(position, self.global_batch, start, stop)
        self.reader.prepare(after, self.global_batch, start, stop)
        found = self.source.values(rows)
        for line, reason in rows.unread.items():
            found.values[line] = Unreadable(reason)
        for line in found.left_out:
            found.values[line] = Unreadable("left out")  # which spares decoding it
        inputs, reasons = decoder.decode(found.values, pin=self.cuda is not None)
        batch = self._batch(rows, inputs, reasons, found.left_out)
        return _Loaded(batch, self.reader.rows, self.reader.resume_point(after))

    def _batch(
        self, rows: Rows, inputs: Any, reasons: Mapping[int, str], left_out: set[int]
    ) -> LabeledBatch | UnlabeledBatch:
        ids = self._tensor(rows.ids)
        if rows.labels is not None:
            for line, reason in reasons.items():
                place = self.reader.describe(int(rows.ids[line]))
                raise DataError(
                    f"{self.source.name}: {place} cannot be decoded: {reason}; mend or remove "
                    "that row"
                )
            return LabeledBatch(inputs, map_arrays(self._tensor, rows.labels), ids)
        epochs = torch.from_numpy(rows.epochs)
        stored = self.stored(rows.ids) if self.stored is not None else None
        if not reasons:
            return UnlabeledBatch(inputs, ids, epochs=epochs, stored=stored)
        valid = torch.ones(len(rows), dtype=torch.bool)
        valid[list(reasons)] = False
        bad = tuple(
            BadRow(int(rows.ids[line]), self.reader.describe(int(rows.ids[line])), reason)
            for line, reason in reasons.items()
            if line not in left_out
        )
        return UnlabeledBatch(inputs, ids, valid, epochs, bad, stored)

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.cuda is not None else tensor
