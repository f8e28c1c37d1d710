"""Notices a training that went wrong without an error: NaN, or one class that takes all."""

from __future__ import annotations

from collections.abc import Mapping

from hpdist.config import Divergence


class DivergenceMonitor:
    """Looks at the global numbers of logged steps; the same on every rank."""

    def __init__(self, config: Divergence) -> None:
        self.config = config
        self._nan: int | None = None  # the first logged step of which that is so
        self._collapsed: int | None = None

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[int, str] | None:
        """The first step of what has gone wrong, and what it is; None while all is well."""
        config = self.config
        share = metrics.get("pseudo_label_top_share", 0.0)
        self._nan = _since(self._nan, step, metrics["loss"] != metrics["loss"])
        self._collapsed = _since(self._collapsed, step, share >= config.collapse_share)
        if self._nan is not None and step - self._nan + 1 >= config.nan_steps:
            return self._nan, f"the loss has been NaN since step {self._nan}"
        if self._collapsed is not None and step - self._collapsed + 1 >= config.collapse_steps:
            return self._collapsed, (
                f"the pseudo-labels have collapsed: since step {self._collapsed} one class takes "
                f"{100 * share:.1f} % of the unlabelled rows"
            )
        return None

    def forget(self) -> None:
        """Begin anew, after going back."""
        self._nan = self._collapsed = None


def _since(first: int | None, step: int, bad: bool) -> int | None:
    if not bad:
        return None
    return step if first is None else first
