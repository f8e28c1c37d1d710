"""Compute time of a rank: what differs between ranks that wait for one another."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

_Moment: TypeAlias = "torch.cuda.Event | float"
_Span: TypeAlias = "tuple[_Moment, _Moment]"
_KEPT = 1000  # steps of a mean
_LISTED = 64  # ranks that have a number each in a record


class RankTimer:
    """The time of each step from its beginning until this rank first waits for the others.

    All ranks take the same number of steps in the same time, since each waits for the slowest. The
    compute time before that shows which rank it is. On a GPU it is measured by the device's own
    clock, which nothing waits for until the time is read.

    Args:
        device: The device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: _Moment | None = None
        self._spans: list[_Span] = []  # of the step that has begun, or of the next one
        self._steps: deque[list[_Span]] = deque(maxlen=_KEPT)

    def begin(self) -> None:
        """Begin a step, unless it has begun already."""
        if self._begun is None:
            self._begun = self._now()

    def end(self) -> None:
        """End the rank's own part of the step, unless it has ended already."""
        if self._begun is not None:
            self._steps.append([*self._spans, (self._begun, self._now())])
            self._begun, self._spans = None, []

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Count what is done inside as part of the next step, which has not begun."""
        begun = self._now()
        yield
        self._spans.append((begun, self._now()))

    def take(self) -> float:
        """Return the mean seconds of the steps since the last call; 0 if there were none."""
        seconds = [sum(_between(*span) for span in step) for step in self._steps]
        self._steps.clear()
        return sum(seconds) / len(seconds) if seconds else 0.0

    def _now(self) -> _Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def stragglers(compute_seconds: Sequence[float], rows: int, step_seconds: float) -> dict[str, Any]:
    """The rank that the others wait for, and how long; nothing if there is only one rank.

    Args:
        compute_seconds: Of each rank, per step, from `RankTimer`.
        rows: Of the global batch.
        step_seconds: Duration of a step, from its beginning to the next.

    `examples_per_second_per_rank` is each rank's speed if its own work were all; of more than 64
    ranks there are only the smallest, the median and the largest, so that a record does not grow
    with them. `slowest_rank_lag` is the share of a step's time by which the slowest rank computes
    longer than the median of the others.
    """
    if len(compute_seconds) < 2:
        return {}
    each = rows / len(compute_seconds)
    slowest = max(range(len(compute_seconds)), key=compute_seconds.__getitem__)
    others = [seconds for rank, seconds in enumerate(compute_seconds) if rank != slowest]
    return {
        **_speeds([round(each / max(s, 1e-9), 1) for s in compute_seconds]),
        "slowest_rank": slowest,
        "slowest_rank_lag": (compute_seconds[slowest] - statistics.median(others)) / step_seconds,
    }


def _speeds(per_rank: list[float]) -> dict[str, Any]:
    """Every rank's speed, or a summary of very many."""
    name = "examples_per_second_per_rank"
    if len(per_rank) <= _LISTED:
        return {name: per_rank}
    middle = statistics.median(per_rank)
    return {f"{name}_min": min(per_rank), f"{name}_median": middle, f"{name}_max": max(per_rank)}


def _between(begun: _Moment, ended: _Moment) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended) - float(begun)  # type: ignore[arg-type]
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3
