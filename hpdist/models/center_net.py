"""A small detector without anchors: a U of plain convolutions, and maps at a quarter of the side.

It is meant for CPUs and small devices, and has no operators but convolutions, normalisation, ReLU,
nearest upsampling and addition. Its outputs are those of `hpdist.tasks.centers`.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.errors import ConfigError
from hpdist.models.build import ModelConfig
from hpdist.models.norm import NormName, make_norm

STRIDE = 4
"""Pixels of a side of the picture for each cell of the maps."""
_WIDEST = 4  # how many times the width the lowest stages have, at most
_PRIOR = -2.19  # logit of 0.1, where all cells begin: the background does not drown the centres


class CenterNetConfig(ModelConfig):
    """Options of a small detector."""

    name: Literal["center_net"] = "center_net"
    width: int = Field(24, gt=0)
    """Channels at a quarter of the side; the stages below have twice and four times as many."""
    depth: int = Field(3, ge=1, le=6)
    """Stages below the maps, each at half the side of the one above: what sees large objects."""
    norm: NormName = "batch"
    """batch: statistics of the global batch; group: of each row by itself."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> CenterNet:
        """Make the network for [channels, height, width]."""
        self.require_image(input_shape)
        multiple = STRIDE * 2**self.depth
        height, width = input_shape[1:]
        if height % multiple or width % multiple:
            near = max(multiple, round(max(height, width) / multiple) * multiple)
            raise ConfigError(
                f"model.name: center_net with depth {self.depth} takes pictures whose sides are "
                f"multiples of {multiple}, not {height} x {width}; set views.size, such as {near}"
            )
        return CenterNet(input_shape[0], self.width, self.depth, num_classes, self.norm)


class CenterNet(nn.Module):
    """Two halvings, `depth` stages down and up again with sums across, and one head per output."""

    def __init__(
        self, channels: int, width: int, depth: int, num_classes: int, norm: NormName = "batch"
    ) -> None:
        super().__init__()
        widths = [width * min(2**stage, _WIDEST) for stage in range(depth + 1)]
        self.stem = nn.Sequential(
            _layer(channels, max(8, width // 2), norm, stride=2),
            _layer(max(8, width // 2), width, norm, stride=2),
            _layer(width, width, norm),
        )
        self.down = nn.ModuleList(
            nn.Sequential(_layer(above, below, norm, stride=2), _layer(below, below, norm))
            for above, below in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(below, above, 1, bias=False), make_norm(norm, above))
            for above, below in itertools.pairwise(widths)
        )
        self.joined = nn.ModuleList(_layer(above, above, norm) for above in widths[:-1])
        self.heat = _head(width, num_classes, norm)
        self.boxes = _head(width, 4, norm)
        last = self.heat[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.constant_(last.bias, _PRIOR)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Maps of images [rows, channels, height, width], at a quarter of their sides.

        `heat` is [rows, classes, height / 4, width / 4], `boxes` [rows, 4, height / 4, width / 4].
        """
        x = self.stem(inputs)
        stages: list[Tensor] = [x]
        for down in self.down:
            x = down(x)
            stages.append(x)
        for number in reversed(range(len(self.up))):
            risen = F.interpolate(self.up[number](x), scale_factor=2.0, mode="nearest")
            x = self.joined[number](torch.relu(stages[number] + risen))
        return {"heat": self.heat(x), "boxes": self.boxes(x)}


def _layer(channels: int, out: int, norm: NormName, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
        make_norm(norm, out),
        nn.ReLU(inplace=True),
    )


def _head(channels: int, out: int, norm: NormName) -> nn.Sequential:
    return nn.Sequential(_layer(channels, channels, norm), nn.Conv2d(channels, out, 1))
