"""Time that a rank works by itself: what differs between ranks that wait for one another."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

_KEPT = 1000  # steps that a mean is over


class RankTimer:
    """The time of each step from its beginning until this rank first waits for the others.

    All ranks take equally many steps in equal time, since each waits for the slowest. How long a
    rank takes until then says which one that is. On a GPU the device's own clock tells, which
    nothing waits for until the time is taken.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: torch.cuda.Event | float | None = None
        self._steps: deque[tuple[torch.cuda.Event | float, torch.cuda.Event | float]] = deque(
            maxlen=_KEPT
        )

    def begin(self) -> None:
        """A step begins, unless it has begun already."""
        if self._begun is None:
            self._begun = self._now()

    def end(self) -> None:
        """The own part of the step is over, unless it was already."""
        if self._begun is not None:
            self._steps.append((self._begun, self._now()))
            self._begun = None

    def take(self) -> float:
        """Mean seconds of the steps since the last call; 0 where there were none."""
        seconds = [_between(*step) for step in self._steps]
        self._steps.clear()
        return sum(seconds) / len(seconds) if seconds else 0.0

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def stragglers(compute_seconds: Sequence[float], rows: int, step_seconds: float) -> dict[str, Any]:
    """Which rank the others wait for, and how long; nothing where there is but one rank.

    Args:
        compute_seconds: Of each rank, a step, as `RankTimer` has them.
        rows: Of the global batch.
        step_seconds: What a step takes, from its beginning to the next.

    `examples_per_second_per_rank` is how fast each would be if its own work were all;
    `slowest_rank_lag` is the share of a step's time that the slowest one works longer than the
    median of the others.
    """
    if len(compute_seconds) < 2:
        return {}
    each = rows / len(compute_seconds)
    slowest = max(range(len(compute_seconds)), key=compute_seconds.__getitem__)
    others = [seconds for rank, seconds in enumerate(compute_seconds) if rank != slowest]
    return {
        "examples_per_second_per_rank": [round(each / max(s, 1e-9), 1) for s in compute_seconds],
        "slowest_rank": slowest,
        "slowest_rank_lag": (compute_seconds[slowest] - statistics.median(others)) / step_seconds,
    }


def _between(begun: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended) - float(begun)  # type: ignore[arg-type]
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3
