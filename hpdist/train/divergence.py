"""Detects a training that fails without an error: NaN, collapse into one class, overflows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from hpdist.config.section import Section

_WINDOW = 100  # attempts
_STORM = 20  # overflows in the window; the search for the first loss scale has up to 16


class Divergence(Section):
    """The reaction to a training that fails without an error, as seen in the logged steps."""

    on: Literal["stop", "rollback"] = "stop"
    """stop ends the run; rollback resumes from the newest earlier checkpoint, with later rows."""
    nan_steps: int = Field(1, gt=0)
    """Applied steps in a row whose loss may be NaN."""
    collapse_share: float = Field(0.98, gt=0, le=1)
    """Largest share of the pseudo-labels that one class may have."""
    collapse_steps: int = Field(1000, gt=0)
    """Applied steps in a row for which one class may have more."""
    most_rollbacks: int = Field(3, gt=0)
    """Number of rollbacks before the run ends."""


class OverflowStorm:
    """Detects that many steps overflow, although never enough in a row to end the run."""

    def __init__(self) -> None:
        self._latest: deque[bool] = deque(maxlen=_WINDOW)
        self._announced = False

    def look(self, overflowed: bool) -> str | None:
        """The message when a storm begins; None before, after and while it lasts."""
        self._latest.append(overflowed)
        count = sum(self._latest)
        if count < _STORM or self._announced:
            self._announced = self._announced and count > _STORM // 2
            return None
        self._announced = True
        return f"{count} of the last {len(self._latest)} steps overflowed"


class DivergenceMonitor:
    """Checks the global numbers of logged steps; the same on every rank."""

    def __init__(self, config: Divergence) -> None:
        self.config = config
        self._nan: int | None = None  # the first logged step with a NaN
        self._collapsed: int | None = None

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[int, str] | None:
        """The first step of a failure, and its description; None if there is none."""
        config = self.config
        share = metrics.get("pseudo_label_top_share", 0.0)
        self._nan = _since(self._nan, step, metrics["loss"] != metrics["loss"])
        self._collapsed = _since(self._collapsed, step, share >= config.collapse_share)
        if self._nan is not None and step - self._nan + 1 >= config.nan_steps:
            return self._nan, f"the loss has been NaN since step {self._nan}"
        if self._collapsed is not None and step - self._collapsed + 1 >= config.collapse_steps:
            return self._collapsed, (
                f"the pseudo-labels have collapsed: since step {self._collapsed} one class has "
                f"{100 * share:.1f} % of the unlabelled rows"
            )
        return None

    def forget(self) -> None:
        """Reset, after a rollback."""
        self._nan = self._collapsed = None


def _since(first: int | None, step: int, bad: bool) -> int | None:
    if not bad:
        return None
    return step if first is None else first
