"""Loss scaling: one number for every rank and for every term of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpdist.engines.config import LossScale


@dataclass
class LossScaler:
    """Halves on overflow and doubles after `growth_interval` steps without one; or stays fixed.

    The scale changes only after the update was computed with the old one. Source: Micikevicius et
    al. 2018, "Mixed Precision Training", section 3.2.
    """

    scale: float
    growth_interval: int
    minimum: float
    dynamic: bool
    good_steps: int = 0

    @classmethod
    def of(cls, config: LossScale) -> LossScaler:
        """Make the scaler from a config."""
        return cls(
            scale=config.static or config.initial,
            growth_interval=config.growth_interval,
            minimum=config.minimum,
            dynamic=config.static is None,
        )

    @property
    def at_minimum(self) -> bool:
        """Whether a dynamic scale cannot fall further."""
        return self.dynamic and self.scale <= self.minimum

    def update(self, overflowed: bool) -> None:
        """Update the scale after a step."""
        if not self.dynamic:
            return
        if overflowed:
            self.scale = max(self.scale / 2, self.minimum)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2
            self.good_steps = 0

    def state(self) -> dict[str, Any]:
        """The numbers for a checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's numbers."""
        for name in {field.name for field in dataclasses.fields(self)} & state.keys():
            setattr(self, name, state[name])
