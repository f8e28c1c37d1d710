"""Measures formats and precisions of a model on this device: score, latency and bytes.

All candidates take turns, round after round, so that what else the machine does falls on all of
them alike. The first forwards only warm up. Latency is that of views and model for one batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.structures import Structure, index
from hpdist.errors import ConfigError
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.measure import Measured, measure
from hpdist.evaluate.precision import SIMULATED
from hpdist.messages.human import size
from hpdist.messages.progress import working

_WARM, _FEWEST, _MOST = 5, 10, 100
_SECONDS = 3.0  # for each candidate, after the fewest rounds


@dataclass(frozen=True)
class Candidate:
    """A model in a format and a precision."""

    name: str
    """What was named on the command line."""
    predictor: LoadedModel

    @property
    def runs_on(self) -> str:
        """The program that runs it."""
        backend = self.predictor.backend
        return "torch" if backend is None else backend.name


@dataclass(frozen=True)
class Timed:
    """What was measured of a candidate."""

    name: str
    runs_on: str
    measured: Measured
    headline: str
    milliseconds: tuple[float, ...]
    """The latency of each batch."""
    batch: int

    @property
    def median(self) -> float:
        """The median latency, in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def slowest_tenth(self) -> float:
        """The latency that 90 % of the batches keep, in milliseconds."""
        return sorted(self.milliseconds)[max(-(-9 * len(self.milliseconds) // 10) - 1, 0)]

    @property
    def score(self) -> float:
        """The headline of the task."""
        return float(self.measured.scores.values[self.headline])

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON."""
        return {
            "name": self.name,
            "runs_on": self.runs_on,
            "precision": self.measured.precision,
            "median_ms": round(self.median, 4),
            "ms_of_90_percent": round(self.slowest_tenth, 4),
            "forwards": len(self.milliseconds),
            "batch": self.batch,
            **self.measured.to_json(),
        }


def benchmark(
    candidates: Sequence[Candidate], rows: LabeledRows, batch: int, seconds: float = _SECONDS
) -> list[Timed]:
    """Measure every candidate on all rows of a set, and its latency on one batch of them.

    `rows` is what `open_measured` gave for the first candidate. Raises ConfigError where one is of
    another task or other classes.
    """
    first = candidates[0].predictor
    for each in candidates[1:]:
        other = each.predictor
        if (other.task.name, other.names) != (first.task.name, first.names):
            raise ConfigError(
                f"{each.name} is a model of another task or other classes than "
                f"{candidates[0].name}; measure it by itself"
            )
    measured = [measure([each.predictor], rows)[0] for each in candidates]
    latencies = _latencies(candidates, _one_batch(first, rows, batch), seconds)
    return [
        Timed(each.name, each.runs_on, found, first.task.headline, tuple(taken), batch)
        for each, found, taken in zip(candidates, measured, latencies, strict=True)
    ]


def _one_batch(predictor: LoadedModel, rows: LabeledRows, batch: int) -> Structure:
    """Decode a batch of real rows, which are repeated where the set has fewer."""
    for found, valid in evaluation_batches(rows, predictor.spec, batch, 0, 1):
        places = valid.nonzero().flatten()
        if len(places):
            return index(found.inputs, places[torch.arange(batch) % len(places)])
    raise ConfigError(f"{rows.name}: not one row can be decoded")


def _latencies(
    candidates: Sequence[Candidate], inputs: Structure, seconds: float
) -> list[list[float]]:
    """Time every candidate in turn, in milliseconds."""
    for each in candidates:
        for _ in range(_WARM):
            _time(each.predictor, inputs)
    taken: list[list[float]] = [[] for _ in candidates]
    began = time.monotonic()
    with working("timing", _MOST, "rounds") as work:
        for count in range(_MOST):
            if count >= _FEWEST and time.monotonic() - began > seconds * len(candidates):
                break
            for each, own in zip(candidates, taken, strict=True):
                own.append(_time(each.predictor, inputs))
            work.add(1)
    return taken


def _time(predictor: LoadedModel, inputs: Structure) -> float:
    began = time.perf_counter()
    predictor.outputs(inputs)
    if predictor.device.type == "cuda":
        torch.cuda.synchronize(predictor.device)
    return 1000 * (time.perf_counter() - began)


def table(found: Sequence[Timed], in_percent: frozenset[str] = frozenset()) -> str:
    """Lay out what was measured, a line for each candidate, and say where half does not pay."""
    headline = found[0].headline
    head = ["model", "runs on", "precision", headline, "median", "90 %", "rows/s", "bytes"]
    lines = [head]
    for one in found:
        score = f"{100 * one.score:.2f} %" if headline in in_percent else f"{one.score:.4f}"
        star = "*" if one.measured.simulated else ""
        lines.append(
            [
                *(one.name, one.runs_on, one.measured.precision, score),
                *(f"{one.median:.2f} ms{star}", f"{one.slowest_tenth:.2f} ms{star}"),
                *(f"{1000 * one.batch / one.median:,.0f}{star}", size(one.measured.bytes)),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*shown, *_notes(found)])


def _notes(found: Sequence[Timed]) -> list[str]:
    """Say which numbers mean nothing, and where fewer bits take no less time."""
    notes = [f"* {SIMULATED}"] if any(one.measured.simulated for one in found) else []
    for one in found:
        full = _in_full(one, found)
        if full is None or one.measured.simulated or one.median < full.median:
            continue
        notes.append(
            f"note: {one.measured.precision} does not pay in time on {one.runs_on} here: "
            f"{one.median:.2f} ms against {full.median:.2f} ms in fp32; it takes "
            f"{size(one.measured.bytes)} instead of {size(full.measured.bytes)}"
        )
    return notes


def _in_full(one: Timed, found: Sequence[Timed]) -> Timed | None:
    """Find what runs on the same program in fp32."""
    if one.measured.precision == "fp32":
        return None
    same = [
        other
        for other in found
        if other.measured.precision == "fp32" and other.runs_on == one.runs_on
    ]
    return next((other for other in same if other.name == one.name), same[0] if same else None)
