"""Measures a model in several precisions on all rows of a labelled set: what half precision costs.

Every batch goes through the model in each precision, so that outputs are compared row by row. On
several ranks each row is measured once, and all numbers are those of all rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdist.data.batch import BadRow
from hpdist.data.config import LabelColumn, Loading
from hpdist.data.decode.stored_values import Column
from hpdist.data.kinds import InputKind
from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.in_memory import IN_MEMORY
from hpdist.data.sources.label_encoding import Encoding
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.labels import label_column, read_labels
from hpdist.data.sources.loading import open_table, same_column
from hpdist.data.structures import Structure, index, tensors_of
from hpdist.data.views.make import TARGETS
from hpdist.distributed.collectives import gathered, sums, world_size
from hpdist.distributed.joined import own_place
from hpdist.errors import ConfigError, DataError
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.precision import is_simulated
from hpdist.evaluate.rows import source_of
from hpdist.evaluate.scoring import together
from hpdist.messages.progress import Work, working
from hpdist.messages.redaction import redacted_parts
from hpdist.tasks.metrics import AnyScores, Meter, confused_pairs

_WHERE = "data.test"


@dataclass(frozen=True)
class Read:
    """How a set is read: as the labelled rows of the training were."""

    column: Column
    label_column: str
    kind: InputKind
    encoding: Encoding
    unlabeled_value: Any = False


@dataclass(frozen=True)
class Measured:
    """A model in one precision, measured on a set."""

    precision: str
    scores: AnyScores
    rows: int
    """Rows of all ranks that the scores are over."""
    bad_rows: int
    """Rows that could not be decoded."""
    agreement: float | None
    """The share of rows whose label is that in fp32; None of a task whose labels are numbers."""
    largest_difference: float
    """The largest difference of an output from that in fp32, among rows with finite outputs."""
    not_finite: int
    """Rows with an output that is NaN or infinite."""
    seconds: float
    """Seconds of views and model, on the slowest rank."""
    bytes: int
    """Bytes of weights and buffers, or of an exported file."""
    simulated: bool
    """Whether the device only gave the precision's accuracy, so that the seconds say nothing."""

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON; a score that is no finite number is null."""
        pairs = confused_pairs(self.scores)
        return {
            "scores": {name: _finite(value) for name, value in self.scores.values.items()},
            "confusion": self.scores.counts,
            **({} if pairs is None else {"most_confused": pairs}),
            "agreement": self.agreement,
            "largest_difference": _finite(self.largest_difference),
            "rows_not_finite": self.not_finite,
            "seconds": round(self.seconds, 4),
            "rows_per_second": round(self.rows / self.seconds, 1) if self.seconds else None,
            "bytes": self.bytes,
            "simulated": self.simulated,
        }


@dataclass
class _Compared:
    """What this rank's rows say of one precision."""

    predictor: LoadedModel
    meter: Meter | None = None
    seconds: float = 0.0
    agreeing: int = 0
    comparable: bool = True
    largest: float = 0.0
    not_finite: int = 0


def open_measured(
    predictor: LoadedModel, data: Any = None, overrides: Mapping[str, Any] | None = None
) -> LabeledRows:
    """Open the set to measure on: `data`, else the run's test set, read as in the training.

    Args:
        predictor: The model.
        data: A path, settings of a `data.test` section, a pair of rows and settings, or rows in
            memory; by default the run's test set.
        overrides: Settings that replace those of the set.

    Raises ConfigError where the run had no test set, and DataError where the set does not fit.
    """
    loading = Loading()
    if data is None:
        data, loading = _test_of(predictor, overrides or {})
    elif overrides:
        rows, settings = data if isinstance(data, tuple) else (data, {})
        data = (rows, {**settings, **overrides})
    config, held = source_of(data, _WHERE, LabelColumn)
    labels = predictor.description.labels
    encoding = predictor.encoding or _encoding_of(predictor, config, held, loading)
    read = Read(predictor.column, labels.column, predictor.kind, encoding, labels.unlabeled_value)
    return open_test(config, read, predictor.spec, dataset=held, where=_WHERE, loading=loading)


def _test_of(predictor: LoadedModel, overrides: Mapping[str, Any]) -> tuple[Any, Loading]:
    """The settings of the run's test set, with others over them, and of how it is read."""
    kept = predictor.description.test or {"set": {}, "loading": {}}
    found = {**kept["set"], **overrides}
    if found.get("path", IN_MEMORY) == IN_MEMORY:
        why = "was given in Python" if kept["set"] else "is not there"
        raise ConfigError(f"the run's data.test {why}; name the data to measure on")
    hidden = redacted_parts(found)
    if hidden:
        raise ConfigError(
            f"data.test.{hidden[0]}: a password or signature was left out of the run's files; "
            f"give it again: --data.test.{hidden[0]} …"
        )
    return found, Loading.model_validate(kept["loading"])


def _encoding_of(
    predictor: LoadedModel, config: LabelColumn, held: Any, loading: Loading
) -> Encoding:
    """Have the task read the set's own labels, of a task that keeps no encoding."""
    table, name, _ = open_table(config, held, _WHERE, (), loading, in_place=True)
    usual = same_column(predictor.description.labels.column, table.features)
    column = label_column(table.features, config.label or usual, _WHERE)
    stored = read_labels(table, column, _WHERE, name)
    found = predictor.task.find_encoding(stored, None, predictor.names)
    if tuple(found.classes.names) != predictor.names:
        raise DataError(
            f"{name}: its {predictor.task.names_are} are {', '.join(found.classes.names)}, and the "
            f"model's are {', '.join(predictor.names)}"
        )
    state = {
        name.removeprefix(TARGETS): tensor.numpy()
        for name, tensor in predictor.fitted.items()
        if name.startswith(TARGETS)
    }
    return found.fitted(None, state) if state else found


def measure(
    predictors: Sequence[LoadedModel],
    rows: LabeledRows,
    batch: int | None = None,
    report: Callable[[BadRow], None] = lambda row: None,
) -> list[Measured]:
    """Measure models on all rows of a set; differences are those from the first.

    Args:
        predictors: Of the same weights, the first in fp32.
        rows: What `open_measured` gave.
        batch: Rows of a forward on each rank; by default as many as the run's evaluation had.
        report: Is given every row of this rank that cannot be decoded.

    Collective: every rank must call. Raises EvaluationError or DataError, on all ranks, where
    anything fails on one of them.
    """
    compared = [_Compared(predictor) for predictor in predictors]
    size = batch or predictors[0].description.batch
    with working(f"evaluating {rows.name}", len(rows), "rows") as work:
        count = together(lambda: _go_through(compared, rows, size, report, work))
    (total,) = sums([count])
    if not total:
        error = DataError("not one row of the set that is measured on can be decoded")
        error.everywhere = True
        raise error
    return [_result(each, total, len(rows)) for each in compared]


def _go_through(
    compared: Sequence[_Compared],
    rows: LabeledRows,
    size: int,
    report: Callable[[BadRow], None],
    work: Work,
) -> int:
    """Put this rank's rows through every model; give how many count."""
    spec = compared[0].predictor.spec
    for each in compared:
        _timed(each, spec.example(2), warm=False)
    found = 0
    for batch, valid in evaluation_batches(rows, spec, size, *own_place(), report):
        first: Structure | None = None
        for each in compared:
            outputs = _timed(each, batch.inputs)
            device = next(tensors_of(outputs)).device
            labels = batch.to(device).labels
            each.meter = each.meter or each.predictor.task.meter(outputs)
            each.meter.add(outputs, labels, valid.to(device))
            first = outputs if first is None else first
            if bool(valid.any()):
                _compare(each, index(outputs, valid), index(first, valid))
        found += int(valid.sum())
        work.add(int(valid.sum()) * world_size())
    return found


def _timed(each: _Compared, inputs: Structure, *, warm: bool = True) -> Structure:
    """Give a model's outputs, and count the seconds unless it only warms up."""
    device, began = each.predictor.device, time.monotonic()
    outputs = each.predictor.outputs(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    each.seconds += time.monotonic() - began if warm else 0.0
    return outputs


def _compare(each: _Compared, outputs: Structure, first: Structure) -> None:
    """Compare the rows that count with those of the first model."""
    rows = next(tensors_of(outputs)).shape[0]
    finite = torch.ones(rows, dtype=torch.bool)
    differences = torch.zeros(rows, dtype=torch.float64)
    for own, other in zip(tensors_of(outputs), tensors_of(first), strict=True):
        if not own.is_floating_point() or own.shape != other.shape:
            continue
        one, two = (t.double().cpu().reshape(rows, -1) for t in (own, other))
        finite &= one.isfinite().all(dim=1) & two.isfinite().all(dim=1)
        differences = torch.maximum(differences, _largest(one, two))
    each.not_finite += int((~finite).sum())
    each.largest = max(each.largest, float(differences[finite].max()) if finite.any() else 0.0)
    own_labels, other_labels = (each.predictor.columns(o).get("label") for o in (outputs, first))
    if isinstance(own_labels, list) and isinstance(other_labels, list):
        pairs = zip(own_labels, other_labels, strict=True)
        each.agreeing += sum(bool(np.all(a == b)) for a, b in pairs)
    else:
        each.comparable = False


def _largest(one: Tensor, two: Tensor) -> Tensor:
    """The largest difference of each row, [rows]."""
    return (one - two).abs().amax(dim=1) if one.shape[1] else torch.zeros(len(one)).double()


def _result(each: _Compared, count: int, rows: int) -> Measured:
    """Add up what all ranks have found. Collective."""
    meter = each.meter
    assert meter is not None
    scores = together(meter.result)
    everyone = gathered(
        (each.agreeing, each.comparable, each.largest, each.not_finite, each.seconds)
    )
    agreeing, comparable, largest, not_finite, seconds = zip(*everyone, strict=True)
    predictor = each.predictor
    return Measured(
        precision=predictor.precision,
        scores=scores,
        rows=count,
        bad_rows=rows - count,
        agreement=sum(agreeing) / count if all(comparable) else None,
        largest_difference=max(largest),
        not_finite=sum(not_finite),
        seconds=max(seconds),
        bytes=predictor.bytes,
        simulated=predictor.backend is None and is_simulated(predictor.precision, predictor.device),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
