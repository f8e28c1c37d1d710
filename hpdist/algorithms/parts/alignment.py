"""Distribution alignment: predictions whose mean is made to follow a prior over the classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdist.errors import CheckpointError

WINDOW = 128
"""Batches over which ReMixMatch's, AdaMatch's and CReST's own code averages predictions."""
LABELED_MOMENTUM = 0.999
"""Momentum of the same code's average of the labelled rows."""


def uniform_prior(num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """1/C for every class, [classes], fp32: where an average starts, or what it is aligned with."""
    return torch.full((num_classes,), 1 / num_classes, device=device)


def moved(average: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """A moving average after one more step: momentum * average + (1 - momentum) * mean."""
    return average.lerp(mean, 1 - momentum)


def aligned(logits: Tensor, mean: Tensor, prior: Tensor) -> Tensor:
    """N(p * prior / mean) of each row, [rows, classes], where N makes a row sum to 1.

    `mean` [classes] is the moving average of p over the unlabelled rows. Computed as the softmax of
    z + log prior - log mean, which neither overflows nor divides by 0 for a class that is never
    predicted.
    """
    tiny = torch.finfo(torch.float32).tiny
    shift = prior.clamp(min=tiny).log() - mean.clamp(min=tiny).log()
    return (logits + shift).softmax(dim=-1)


@dataclass(frozen=True)
class MeanPrediction:
    """The mean prediction over steps: of the last batches, or a moving average.

    Args:
        name: Of the moving average in an algorithm's state; a window is stored as "recent" + name.
        window: Number of batches of the mean; before the first step each of them is uniform.
        momentum: Replaces the window by a moving average, which begins as uniform.
    """

    name: str
    window: int = WINDOW
    momentum: float | None = None

    @property
    def key(self) -> str:
        """The name in an algorithm's state."""
        return f"recent_{self.name}" if self.momentum is None else self.name

    def start(self, num_classes: int, device: torch.device | str) -> dict[str, Tensor]:
        """The state before the first step: [window, classes], or [classes] of a moving average."""
        uniform = uniform_prior(num_classes, device)
        if self.momentum is None:
            uniform = uniform.expand(self.window, -1)
        return {self.key: uniform.clone()}

    def after(self, state: Mapping[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """The state after one more step, whose global batch has this mean prediction [classes]."""
        old = state[self.key]
        if self.momentum is None:
            return {self.key: torch.cat([old[1:], mean[None]])}
        return {self.key: moved(old, mean, self.momentum)}

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """The mean that a state holds, [classes]."""
        held = state[self.key]
        return held.mean(dim=0) if self.momentum is None else held

    def check(self, state: Mapping[str, Tensor], setting: str) -> None:
        """Raise CheckpointError if a state holds the other kind of mean, or another window.

        `setting` is the part of a config that holds `momentum` and `window`.
        """
        if self.key in state:
            held = len(state[self.key])
            if self.momentum is None and held != self.window:
                raise CheckpointError(
                    f"the checkpoint holds the mean predictions of {held} batches, and "
                    f"{setting}.window is {self.window}; set it to {held} to continue from there"
                )
        elif self.name in state and self.momentum is None:
            raise CheckpointError(
                f"the checkpoint holds a moving average of the predictions, and {setting} now uses "
                f"the mean of the last {self.window} batches; set {setting}.momentum to what it "
                "was (by default 0.999, of remixmatch 0.984) to continue from there"
            )
        elif f"recent_{self.name}" in state and self.momentum is not None:
            raise CheckpointError(
                f"the checkpoint holds the mean predictions of the last batches, and "
                f"{setting}.momentum asks for a moving average; leave it out to continue from there"
            )
