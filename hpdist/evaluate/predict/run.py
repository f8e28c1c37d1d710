"""Predicts a dataset into a folder of Parquet files.

    predicted = predict_to(hpdist.load("runs/digits"), Unlabeled(path="scans"), Path("labels"))

Each rank writes parts of its own and waits for the others at the end alone. A part that is there is
not written again, so a run that was killed goes on, on any number of ranks, and the folder is the
same to the byte where the kernels of both give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch

from hpdist.checkpoint.manifest import hash_of
from hpdist.data.config import Loading, Unlabeled
from hpdist.data.decode.decoders import Decoder
from hpdist.data.sources.label_files import METADATA
from hpdist.data.structures import Structure, cat, index, to
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.errors import CheckpointError, ConfigError, why_not_written
from hpdist.evaluate.export.read import files_of
from hpdist.evaluate.predict.memory_format import channels_last
from hpdist.evaluate.predict.parts import (
    Batch,
    Batches,
    Layout,
    by_length,
    make_layout,
    to_bytes,
    windows,
)
from hpdist.evaluate.predict.plan import Plan, begin, write_whole
from hpdist.evaluate.predict.rows import OrderedRows, ReadsInputs, open_rows
from hpdist.messages.progress import working
from hpdist.tasks.base import Task

_POLL = 0.2  # seconds between two looks at the other ranks' parts, at first
_LONGEST_POLL = 2.0
_NAMED = 5  # bad rows


class Predicts(ReadsInputs, Protocol):
    """A model as predicting uses it; `hpdist.load` gives one."""

    @property
    def model(self) -> Any:
        """The model itself."""
        ...

    @property
    def task(self) -> Task:
        """What gives the outputs their meaning."""
        ...

    @property
    def names(self) -> Any:
        """The names of the classes or targets."""
        ...

    @property
    def run_id(self) -> Any:
        """The run that the model is of."""
        ...

    @property
    def source(self) -> Path:
        """The folder or exported file that the model was loaded from."""
        ...

    def outputs(self, inputs: Structure) -> Structure:
        """Give the task's outputs, fp32, for decoded rows."""
        ...


@dataclass(frozen=True)
class PredictOptions:
    """What is written, and how rows are divided.

    Args:
        probabilities: Write everything that the task has of a row, not label and confidence alone.
        columns: Columns of the dataset that are carried along.
        threshold: Write only rows whose confidence reaches it.
        batch: Rows of a forward.
        part_rows: Rows of a file.
        pad: The token that pads text, whose rows are then sorted by length.
    """

    probabilities: bool = False
    columns: tuple[str, ...] = ()
    threshold: float | None = None
    batch: int = 256
    part_rows: int = 65_536
    pad: int | None = None


@dataclass(frozen=True)
class Predicted:
    """What a folder of predictions holds once it is whole."""

    folder: Path
    rows: int
    """Rows of the dataset that are used."""
    written: int
    """Rows that are written, of which some may be bad."""
    bad: int
    """Rows that cannot be used."""
    named: tuple[str, ...]
    """Some of the bad rows, with the reasons."""
    predicted: int
    """Rows that this start has predicted, on this rank."""
    seconds: float


def predict_to(
    model: Predicts,
    data: Unlabeled,
    out: Path,
    options: PredictOptions | None = None,
    *,
    loading: Loading | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Predicted | None:
    """Predict every row of a dataset, or go on with it. Collective: every rank must call.

    Returns what was written, on rank 0 once all ranks' parts are there, and None on the others.
    Raises DataError where the dataset is not what the model takes or `out` holds something else.
    """
    options = options or PredictOptions()
    loading = loading or Loading()
    rows = call_on_all_ranks(lambda: open_rows(data, model, loading, options.columns))
    try:
        plan = Plan(out, rows.count, options.part_rows)
        layout = call_on_all_ranks(lambda: _layout(model, rows, options))
        facts = _facts(model, rows, data, options)
        run_on_main(lambda: begin(plan, facts))
        missing = run_on_main(plan.missing)
        own = plan.share(missing, rank, world_size)
        start = time.monotonic()
        others = set(missing) - set(own)
        with channels_last(model):
            predicted = _write_parts(model, rows, plan, own, layout, options, loading, others)
        if rank != 0:
            return None
        return _finish(plan, rows, predicted, time.monotonic() - start)
    finally:
        rows.close()


def _layout(model: Predicts, rows: OrderedRows, options: PredictOptions) -> Layout:
    """Settle the columns. Raises ConfigError where the task has no confidence to go by."""
    names = list(model.names)
    example = model.outputs(model.spec.example(1))

    def make(outputs: Any) -> dict[str, Any]:
        return model.task.prediction_columns(outputs, names)

    made = make(example)
    if options.threshold is not None and "confidence" not in made:
        raise ConfigError(f"--threshold: task {model.task.name} has no confidence; leave it out")
    first = next(iter(rows.read(0, 1)))
    assert first.table is not None
    schema = first.table.schema
    own = {"id", "file", "row_group", "row", "error", *made}
    taken = [name for name in options.columns if name in own]
    if taken:
        raise ConfigError(f"--columns: {taken[0]} is a column of the predictions themselves")
    return make_layout(
        make,
        example,
        probabilities=options.probabilities,
        carried=[schema.field(name) for name in options.columns],
        names=names,
        threshold=options.threshold,
        always=model.task.always_written,
        types=model.task.prediction_types(),
    )


def _facts(
    model: Predicts, rows: OrderedRows, data: Unlabeled, options: PredictOptions
) -> dict[str, Any]:
    """What must be the same for a folder to be gone on with."""
    return {
        "rows": rows.whole_count,
        "used": rows.count,
        "files": rows.record(),
        "split": data.split,
        "filter": data.filter,
        "map": data.map,
        "task": model.task.name,
        "names": list(model.names),
        "run": model.run_id,
        "weights": _digest(model),
        "precision": str(getattr(model, "precision", "fp32")),
        "options": {
            "probabilities": options.probabilities,
            "columns": list(options.columns),
            "threshold": options.threshold,
            "batch": options.batch,
            "pad": options.pad,
        },
    }


def _digest(model: Predicts) -> str:
    """Give the SHA-256 of the weights, or of the exported file that the model was loaded from."""
    digest = hashlib.sha256()
    source = Path(model.source)
    if source.is_file():
        for file in files_of(source):
            digest.update(hash_of(file).encode())
        return digest.hexdigest()[:32]
    for name, value in model.model.state_dict().items():
        digest.update(name.encode())
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_parts(
    model: Predicts,
    rows: OrderedRows,
    plan: Plan,
    own: list[int],
    layout: Layout,
    options: PredictOptions,
    loading: Loading,
    others: set[int],
) -> int:
    """Predict and write this rank's parts; count their rows.

    `others` are the parts of other ranks, which are waited for at the end without a collective,
    since these time out. A rank that fails ends the launch, and with it this wait.
    """
    spans = [plan.span(part) for part in own]
    todo = sum(stop - start for start, stop in [*spans, *map(plan.span, others)])
    divide = partial(windows, batch=options.batch, sorts=options.pad is not None)
    with (
        Decoder(model.spec, loading.threads, loading.processes) as decoder,
        working(f"predicting {rows.name}", todo, "rows", rate=True) as work,
    ):
        batches = Batches(rows, decoder, divide, options.columns)
        parts = iter(own)
        found: list[tuple[Batch, Any]] = []
        for batch in batches.ahead(spans):
            if batch is not None:
                outputs = _outputs(model, batch, options)
                found.append((replace(batch, inputs=None), outputs))  # a part's would be many
                work.add(len(batch.ids))
                continue
            _write(plan, next(parts), layout.table(found), found)
            found = []
            others = _count_written(plan, others, work.add)
        wait = _POLL
        while others:
            time.sleep(wait)
            wait = min(1.2 * wait, _LONGEST_POLL)
            others = _count_written(plan, others, work.add)
    return sum(stop - start for start, stop in spans)


def _count_written(plan: Plan, parts: set[int], add: Callable[[int], None]) -> set[int]:
    """Count the rows of parts that have been written; give those that are still missing."""
    written = parts - set(plan.missing()) if parts else parts
    for start, stop in map(plan.span, written):
        add(stop - start)
    return parts - written


def _outputs(model: Predicts, batch: Batch, options: PredictOptions) -> Any:
    """Predict the good rows of a batch, in their order; on the CPU."""
    if batch.inputs is None:
        return None
    parts = list(by_length(batch.inputs, options.pad, options.batch))
    outputs = [to(model.outputs(inputs), "cpu") for _, inputs in parts]
    if len(parts) == 1 and options.pad is None:
        return outputs[0]
    lines = torch.cat([lines for lines, _ in parts])
    back = torch.empty_like(lines)
    back[lines] = torch.arange(len(lines))
    joined = cat(outputs)
    return index(joined, back)


def _write(plan: Plan, part: int, table: pa.Table, found: list[tuple[Batch, Any]]) -> None:
    bad = sum(len(batch.reasons) for batch, _ in found)
    own = json.loads(table.schema.metadata[METADATA]) | {"bad": bad}
    table = table.replace_schema_metadata({METADATA: json.dumps(own)})
    try:
        write_whole(plan.path(part), to_bytes(table))
    except OSError as error:
        raise CheckpointError(
            f"--out {plan.folder}: cannot be written: {why_not_written(error, plan.folder)}"
        ) from error


def _finish(plan: Plan, rows: OrderedRows, predicted: int, seconds: float) -> Predicted:
    """Count what all parts hold, and name some of the bad rows."""
    written, bad, named = 0, 0, list[str]()
    for part in range(plan.parts):
        path = plan.path(part)
        metadata = pq.read_metadata(path)
        own: Mapping[str, Any] = json.loads(metadata.metadata[METADATA])
        written += metadata.num_rows
        bad += int(own["bad"])
        if own["bad"] and len(named) < _NAMED:
            table = pq.read_table(path, columns=["id", "error"])
            table = table.filter(pc.is_valid(table.column("error")))
            named += [
                f"{rows.describe(row['id'])}: {row['error']}"
                for row in table.slice(0, _NAMED - len(named)).to_pylist()
            ]
    return Predicted(plan.folder, plan.rows, written, bad, tuple(named), predicted, seconds)
