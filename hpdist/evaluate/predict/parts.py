"""The rows of one part: read and decoded ahead in a thread, predicted, and put into columns."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.sources.label_files import METADATA
from hpdist.data.stream.permute import Int64Array
from hpdist.data.structures import Structure, index, narrow, row_count
from hpdist.errors import printable
from hpdist.evaluate.predict.rows import OrderedRows

_AHEAD = 2  # batches that are decoded before they are needed
_FIRST = 4  # batches of text in a part's first window, for whose decoding the model waits
_GROWTH = 8  # each window holds so many times as many, so that it is decoded meanwhile
_MOST = 64  # batches in a window: what is gained by more is below one in a hundred
_MOST_ROWS = 16_384  # in memory a few times


Divide: TypeAlias = Callable[[int, int], Iterator[tuple[int, int]]]


@dataclass(frozen=True)
class Batch:
    """Rows that are predicted together, and what is carried along with them."""

    ids: Int64Array  # [rows]
    inputs: Structure | None  # of the rows without a reason, until these are predicted
    reasons: dict[int, str]
    """Why, by line, of the rows that cannot be used."""
    columns: dict[str, pa.Array]
    """The place of each row and the columns that are carried along."""


class Batches:
    """Reads and decodes the batches of parts ahead, in a thread.

    Args:
        rows: The dataset.
        decoder: Decodes its rows.
        divide: Divides the rows of a part, from and to, into those of its batches.
        carried: Columns that are written beside the predictions.
    """

    def __init__(
        self, rows: OrderedRows, decoder: Decoder, divide: Divide, carried: Sequence[str]
    ) -> None:
        self._rows = rows
        self._decoder = decoder
        self._divide = divide
        self._carried = list(carried)

    def ahead(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch | None]:
        """Give the batches of all spans in order, and None behind the last of each span.

        An error of the thread is raised here.
        """
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
        stopping = threading.Event()

        def work() -> None:
            try:
                for span in spans:
                    for start, stop in self._divide(*span):
                        if stopping.is_set():
                            return
                        for batch in self._read(start, stop):
                            made.put(batch)
                    made.put(None)
            except BaseException as error:
                made.put(error)

        thread = threading.Thread(target=work, name="hpdist-predict", daemon=True)
        thread.start()
        ended = 0
        try:
            while ended < len(spans):
                item = made.get()
                if isinstance(item, BaseException):
                    raise item
                ended += item is None
                yield item
        finally:
            stopping.set()
            while thread.is_alive():
                while not made.empty():  # so that the thread is not kept waiting
                    made.get_nowait()
                thread.join(0.05)

    def _read(self, start: int, stop: int) -> Iterator[Batch]:
        """Read the rows of one batch; they may lie in several runs."""
        ids, values, left_out = list[Int64Array](), list[Any](), set[int]()
        columns: dict[str, list[pa.Array]] = {}
        for run in self._rows.read(start, stop):
            assert run.table is not None
            found = self._rows.rows.values(run)
            for line, reason in run.unread.items():
                found.values[line] = Unreadable(reason)
            left_out.update(len(values) + line for line in found.left_out)
            values.extend(found.values)
            ids.append(run.ids)
            named = self._rows.places(run.ids, run.table)
            named |= {name: run.table.column(name).combine_chunks() for name in self._carried}
            for name, column in named.items():
                columns.setdefault(name, []).append(column)
        kept = [line for line in range(len(values)) if line not in left_out]
        if kept:
            yield self._decoded(
                np.concatenate(ids)[kept],
                [values[line] for line in kept],
                {name: _joined(parts).take(pa.array(kept)) for name, parts in columns.items()},
            )

    def _decoded(self, ids: Int64Array, values: list[Any], columns: dict[str, pa.Array]) -> Batch:
        inputs, reasons = self._decoder.decode(values)
        good = [line for line in range(len(values)) if line not in reasons]
        if not good:
            return Batch(ids, None, reasons, columns)
        if reasons:
            import torch

            inputs = index(inputs, torch.tensor(good))
        return Batch(ids, inputs, reasons, columns)


@dataclass(frozen=True)
class Layout:
    """The columns of a part, and how they are made of a model's outputs."""

    schema: pa.Schema
    predicted: tuple[str, ...]
    make: Callable[[Any], dict[str, Any]]
    """Makes the columns of the task from outputs."""
    threshold: float | None = None

    def table(self, batches: Sequence[tuple[Batch, Any]]) -> pa.Table:
        """Make the table of a part from its batches and the outputs of their good rows."""
        tables = [self._of_batch(batch, outputs) for batch, outputs in batches]
        if not tables:
            return self.schema.empty_table()
        whole = pa.concat_tables(tables)
        if self.threshold is not None:
            sure = np.asarray(whole.column("confidence").to_numpy(), np.float64)
            with np.errstate(invalid="ignore"):
                whole = whole.filter(pa.array(sure >= self.threshold))
        return whole.combine_chunks()

    def _of_batch(self, batch: Batch, outputs: Any) -> pa.Table:
        count = len(batch.ids)
        lines = np.full(count, -1)
        good = [line for line in range(count) if line not in batch.reasons]
        lines[good] = np.arange(len(good))
        taken = pa.array(lines, mask=lines < 0)
        made = self.make(outputs) if outputs is not None else {}
        columns: dict[str, Any] = {"id": pa.array(batch.ids, pa.int64()), **batch.columns}
        for name in self.predicted:
            kind = self.schema.field(name).type
            columns[name] = arrow(made[name], kind).take(taken) if made else pa.nulls(count, kind)
        reasons = [
            printable(batch.reasons[i], 500) if i in batch.reasons else None for i in range(count)
        ]
        columns["error"] = pa.array(reasons, pa.string())
        fields = self.schema
        return pa.table([columns[field.name].cast(field.type) for field in fields], schema=fields)


def make_layout(
    make: Callable[[Any], dict[str, Any]],
    example: Any,
    *,
    probabilities: bool,
    carried: Sequence[pa.Field],
    names: Sequence[str],
    threshold: float | None,
    always: Sequence[str] = ("label", "confidence"),
    types: Mapping[str, pa.DataType] | None = None,
) -> Layout:
    """Settle the columns by what the task makes of some outputs.

    Without `probabilities` only the columns in `always` are written. `types` are those that one row
    may not tell.
    """
    made, known = make(example), types or {}
    wanted = {name: value for name, value in made.items() if probabilities or name in always}
    fields = [
        pa.field("id", pa.int64()),
        pa.field("file", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int64()),
        *(pa.field(name, known.get(name) or arrow_type(v)) for name, v in wanted.items()),
        *carried,
        pa.field("error", pa.string()),
    ]
    metadata = {METADATA: json.dumps({"names": list(names)})}
    return Layout(pa.schema(fields, metadata), tuple(wanted), make, threshold)


def arrow_type(value: Any) -> pa.DataType:
    """Say of which Arrow type a column of predictions is."""
    if isinstance(value, np.ndarray):
        kind = pa.from_numpy_dtype(value.dtype)
        for _ in range(value.ndim - 1):
            kind = pa.list_(kind)
        return kind
    first = next(iter(value), "")
    if isinstance(first, list):
        return pa.list_(arrow_type(first) if first else pa.string())
    return pa.array([first]).type


def arrow(value: Any, kind: pa.DataType) -> pa.Array:
    """Make an Arrow array of a column of predictions."""
    if isinstance(value, np.ndarray) and value.ndim == 2:
        offsets = np.arange(len(value) + 1, dtype=np.int32) * value.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(value.ravel())).cast(kind)
    return pa.array(
        value.tolist() if isinstance(value, np.ndarray) and value.ndim > 2 else value, kind
    )


def to_bytes(table: pa.Table) -> bytes:
    """Write a table as Parquet: equal tables give equal bytes."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", row_group_size=1 << 16)
    return out.getvalue()


def windows(start: int, stop: int, *, batch: int, sorts: bool) -> Iterator[tuple[int, int]]:
    """Divide positions [start, stop) into those of batches, or of windows of batches to sort.

    They depend on the part alone, and not on who predicts it.
    """
    size = most = batch
    if sorts:
        most = max(batch, min(_MOST * batch, _MOST_ROWS))
        size = min(_FIRST * batch, most)
    while start < stop:
        end = min(start + size, stop)
        yield start, end
        start, size = end, min(_GROWTH * size, most)


def by_length(inputs: Structure, pad: int | None, size: int) -> Iterator[tuple[Any, Structure]]:
    """Divide rows of tokens into batches of similar length, without the padding of all of them.

    Gives the lines of each batch, int64, and its rows; anything but padded tokens stays whole.
    """
    import torch

    if pad is None or not isinstance(inputs, torch.Tensor) or inputs.dim() != 2:
        for at in range(0, row_count(inputs), size):
            count = min(size, row_count(inputs) - at)
            yield torch.arange(at, at + count), narrow(inputs, at, count)
        return
    places = torch.arange(1, inputs.shape[1] + 1)
    lengths = ((inputs != pad) * places).amax(dim=1)
    order = torch.argsort(lengths, stable=True)
    for lines in order.split(size):
        yield lines, inputs[lines, : max(1, int(lengths[lines].max()))]


def _joined(parts: Sequence[pa.Array]) -> pa.Array:
    chunks = [c for part in parts for c in (part.chunks if hasattr(part, "chunks") else [part])]
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
