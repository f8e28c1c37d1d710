"""Dynamic loss scaling: one number, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DynamicLossScale:
    """Halves on overflow, doubles after `growth_interval` steps without one.

    The scale changes only after the update was computed with the old one. Source: Micikevicius et
    al. 2018, "Mixed Precision Training", section 3.2.
    """

    scale: float = 2.0**16
    growth_interval: int = 1000
    factor: float = 2.0
    minimum: float = 1.0
    good_steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Take note of how a step went."""
        if overflowed:
            self.scale = max(self.scale / self.factor, self.minimum)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= self.factor
            self.good_steps = 0
