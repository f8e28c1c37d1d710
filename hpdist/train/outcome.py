"""The outcome of an optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpdist.engines.overflow import OverflowSource


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step, the same on every rank."""

    applied: bool
    overflowed: bool
    old_scale: float
    new_scale: float
    grad_norm: float | None = None
    """Global norm of the unscaled gradient before clipping."""
    overflow_source: OverflowSource | None = None
    """The first value that was not finite, in a step that was skipped."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the global batch; only when measured."""
    per_class: Mapping[str, list[float]] = field(default_factory=dict)
    """Numbers of each class, [classes]: shares of the pseudo-labels, thresholds; if measured."""
    per_rank: Mapping[str, list[float]] = field(default_factory=dict)
    """Numbers of each rank, [ranks]: `compute_seconds` (`RankTimer`), and its `rank_metrics`."""
    bad_rows: int = 0
    """Rows of the unlabelled global batch that could not be used."""
    stop: bool = False
    """Whether any rank asked for the run to stop."""
    save: bool = False
    """Whether any rank asked for a checkpoint."""

    @property
    def culprit(self) -> OverflowSource | None:
        """`overflow_source` by its former name, for one release."""
        warnings.warn(
            "StepOutcome.culprit is overflow_source now; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.overflow_source

    @property
    def overflow(self) -> str | None:
        """Where a step overflowed, and the change of the loss scale; None if it did not."""
        if not self.overflowed:
            return None
        where = str(self.overflow_source or "nothing that shows again")
        if self.new_scale == self.old_scale:
            return where
        return f"{where}; loss scale {self.old_scale:g}, now {self.new_scale:g}"
