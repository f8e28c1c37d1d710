"""The contributions of a micro-batch to the loss of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's contributions to the loss of the global batch; each a 0-dim fp32 tensor."""

    supervised: Tensor
    unsupervised: Tensor
    unsupervised_weight: float | Tensor = 1.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further contributions, already weighted."""
    global_extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further terms, already weighted, that are functions of the student's global sums: the whole
    term instead of a contribution, the same everywhere."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further contributions to log, without gradient."""

    def total(self, parts: int) -> Tensor:
        """The loss to differentiate, where `parts` contributions make the global loss."""
        total = self.supervised + self.unsupervised_weight * self.unsupervised
        for term in self.extras.values():
            total = total + term
        for term in self.global_extras.values():
            total = total + term / parts
        return total

    def contributions(self, parts: int) -> dict[str, Tensor]:
        """The values to add up over all parts for the log, without gradient."""
        named = {
            "loss": self.total(parts),
            "supervised_loss": self.supervised,
            "unsupervised_loss": self.unsupervised,
            **self.extras,
            **{name: term / parts for name, term in self.global_extras.items()},
            **self.metrics,
        }
        return {name: value.detach() for name, value in named.items()}
