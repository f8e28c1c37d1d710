"""Wide residual networks, the semi-supervised literature's usual model.

Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks", with the leaky ReLU that
semi-supervised work uses. WRN-28-2 has 1.47 million parameters.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.models.build import ModelConfig
from hpdist.models.norm import NormName, make_norm


class WideResNetConfig(ModelConfig):
    """Options of a wide residual network."""

    name: Literal["wide_resnet"] = "wide_resnet"
    depth: int = Field(28, ge=10)
    """Layers: 6 n + 4."""
    width: int = Field(2, ge=1)
    """Widening factor."""
    norm: NormName = "batch"
    """batch: statistics of the global batch; group: of each row by itself."""
    leaky_slope: float = Field(0.1, ge=0)
    """Slope of the activation for negative values."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability between a block's convolutions."""

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        if (depth - 4) % 6:
            raise ValueError(f"must be 6 n + 4, such as 10, 16, 28 or 40, not {depth}")
        return depth

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> WideResNet:
        """Make the network for [channels, height, width]."""
        self.require_image(input_shape)
        return WideResNet(
            input_shape[0],
            num_classes,
            self.depth,
            self.width,
            self.norm,
            self.leaky_slope,
            self.dropout,
        )


class WideResNet(nn.Module):
    """A convolution, three groups of pre-activation blocks, global mean, linear."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        depth: int = 28,
        width: int = 2,
        norm: NormName = "batch",
        leaky_slope: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.slope = leaky_slope
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        inputs = 16
        for group in range(3):
            outputs = 16 * width * 2**group
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(_Block(inputs, outputs, stride, norm, leaky_slope, dropout))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm = make_norm(norm, inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        self._initialise()

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [rows, classes] of images [rows, channels, height, width]."""
        features = F.leaky_relu(self.norm(self.blocks(self.stem(inputs))), self.slope)
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", a=self.slope)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)


class _Block(nn.Module):
    """Two 3x3 convolutions after normalisation and activation, with a shortcut around them."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: NormName, slope: float, dropout: float
    ) -> None:
        super().__init__()
        self.slope = slope
        self.norm1 = make_norm(norm, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activated = F.leaky_relu(self.norm1(inputs), self.slope)
        hidden = F.leaky_relu(self.norm2(self.conv1(activated)), self.slope)
        residual: Tensor = self.conv2(self.dropout(hidden))
        return residual + (inputs if self.shortcut is None else self.shortcut(activated))
