"""Views and a model that draw from the generators that programs share, as a user's may."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hpdist.config.component import Component


class DrawingConfig(Component):
    """Views of a table that draw."""

    kind: ClassVar[str] = "views"
    name: Literal["python:tests.support.drawing_views:DrawingConfig"]
    input_kind: ClassVar[str] = "table"

    def build(self, seed: int) -> Drawing:
        """Build them; the seed is not used."""
        return Drawing()


class Drawing:
    """Rows with noise of all generators."""

    def plain(self, x: Tensor) -> Tensor:
        """Return the rows."""
        return x.float()

    def weak(self, x: Tensor, **_: Any) -> Tensor:
        """Add noise."""
        noise = random.gauss(0, 1) + float(np.random.normal())
        return x.float() + noise + torch.randn(x.shape)

    def strong(self, x: Tensor, **given: Any) -> Tensor:
        """Add noise."""
        return self.weak(x, **given)


class Dropping(nn.Module):
    """Draws in its forward what no argument of it decides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, [rows, 3]."""
        found: Tensor = self.linear(nn.functional.dropout(x, 0.5, self.training))
        return found
