"""A small convolutional network: enough for digits, quick on a CPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from hpdist.models.build import ModelConfig
from hpdist.models.norm import NormName, make_norm


class CNNConfig(ModelConfig):
    """Options of a small CNN."""

    name: Literal["cnn"] = "cnn"
    width: int = Field(32, gt=0)
    """Channels of the first stage; the later ones have twice and four times as many."""
    norm: NormName = "batch"
    """batch: statistics of the global batch; group: of each row by itself."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> CNN:
        """Make the network for [channels, height, width]."""
        self.require_image(input_shape)
        return CNN(input_shape[0], self.width, num_classes, self.norm)


class CNN(nn.Module):
    """Three stages of two 3x3 convolutions, halving the sides between them; global mean; linear."""

    def __init__(self, channels: int, width: int, num_classes: int, norm: NormName = "batch"):
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(3):
            out = width * 2**stage
            for half in range(2):
                stride = 2 if stage > 0 and half == 0 else 1
                layers += [
                    nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
                    make_norm(norm, out),
                    nn.ReLU(inplace=True),
                ]
                channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [rows, classes] of images [rows, channels, height, width]."""
        logits: Tensor = self.classifier(self.features(inputs).mean(dim=(2, 3)))
        return logits
