"""A network for the comparison on CIFAR-10: few operations for what it learns on one CPU core."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Five 3x3 convolutions, the first, second and fourth of stride 2; global mean; linear."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = [(3, width, 2)]
        for stage in (1, 2):
            out = width * 2**stage
            sizes += [(out // 2, out, 2), (out, out, 1)]
        layers: list[nn.Module] = []
        for channels, out, stride in sizes:
            layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [rows, classes] of images [rows, 3, height, width]."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
