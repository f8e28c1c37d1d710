"""A multi-layer perceptron for tables, or for small flattened images."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from hpdist.models.build import ModelConfig


class MLPConfig(ModelConfig):
    """Options of an MLP."""

    takes: ClassVar = frozenset({"image", "audio", "table"})
    name: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(gt=0)]] = Field([500])
    """Width of each hidden layer; an empty list makes a linear model."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the hidden units; unused without hidden layers."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> MLP:
        """Make the network for inputs of a shape (without the batch)."""
        return MLP(math.prod(input_shape), self.hidden, num_classes, self.dropout)


class MLP(nn.Module):
    """Linear, ReLU, dropout for every hidden layer; then linear. [rows, *] to [rows, classes]."""

    def __init__(self, features: int, hidden: list[int], num_classes: int, dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout)]
            features = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [rows, classes]."""
        logits: Tensor = self.classifier(self.features(inputs.flatten(1)))
        return logits
