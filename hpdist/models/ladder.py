"""Ladder network: an MLP and a noisy copy of it, which a decoder denoises.

Source: Rasmus et al. 2015, arXiv:1507.02672, algorithm 1.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hpdist.distributed.batch_norm import GlobalBatchNorm
from hpdist.models.build import ModelConfig


class LadderConfig(ModelConfig):
    """The paper's network for MNIST; it is trained with the algorithm of the same name."""

    takes: ClassVar = frozenset({"image", "audio", "table"})
    name: Literal["ladder"] = "ladder"
    hidden: list[Annotated[int, Field(gt=0)]] = Field([1000, 500, 250, 250, 250])
    """Width of each hidden layer."""
    noise: float = Field(0.3, ge=0)
    """Standard deviation of the noise on the input and on every normalised layer."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> LadderMLP:
        """Make the network for inputs of a shape (without the batch)."""
        return LadderMLP(math.prod(input_shape), self.hidden, num_classes, self.noise)


class LadderMLP(nn.Module):
    """An MLP with ReLU whose layers are normalised over the global batch, and its decoder.

    In evaluation [rows, *] to logits [rows, classes], without noise. In training to two tensors by
    name: `logits`, those of the noisy encoder, and `reconstruction` [rows, layers + 1], the row's
    reconstruction cost of the input and of every layer, mean_i (z_i - (z^_i - mu_i) / sigma_i)^2,
    where z is what the clean encoder has, z^ the decoder's guess and mu and sigma those of the
    batch before it was normalised to z (of the input 0 and 1). Gradient flows through both
    encoders, mu and sigma.

    The running statistics are those of the clean encoder. The noise is torch's own; like dropout,
    it differs with the number of ranks.
    """

    head_names = ("reconstruction",)

    def __init__(self, features: int, hidden: list[int], num_classes: int, noise: float = 0.3):
        super().__init__()
        sizes = [features, *hidden, num_classes]
        self.noise = noise
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.clean_norms = nn.ModuleList(GlobalBatchNorm(n, affine=False) for n in sizes[1:])
        self.noisy_norms = nn.ModuleList(_plain_norm(n) for n in sizes[1:])
        self.affines = nn.ModuleList(Affine(n) for n in sizes[1:])
        self.backs = nn.ModuleList(nn.Linear(b, a, bias=False) for a, b in pairs)
        self.decoder_norms = nn.ModuleList(_plain_norm(n) for n in sizes)
        self.combinators = nn.ModuleList(Combinator(n) for n in sizes)

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Logits [rows, classes]; in training by name, with the layers' costs."""
        rows = inputs.flatten(1)
        if not self.training:
            clean, _, logits = self._encode(rows, self.clean_norms, 0.0)
            return logits
        noisy, _, logits = self._encode(rows, self.noisy_norms, self.noise)
        clean, before, _ = self._encode(rows, self.clean_norms, 0.0)
        guesses = self._decode(noisy, logits.float().softmax(dim=1).to(logits.dtype))
        costs = [(clean[0].float() - guesses[0]).square().mean(dim=1)]
        layers = zip(self.clean_norms, before, clean[1:], guesses[1:], strict=True)
        for norm, raw, target, guess in layers:
            assert isinstance(norm, GlobalBatchNorm)
            costs.append(
                (target.float() - norm.normalize_with_stats_of(raw, guess)).square().mean(dim=1)
            )
        return {"logits": logits.float(), "reconstruction": torch.stack(costs, dim=1)}

    def _encode(
        self, rows: Tensor, norms: nn.ModuleList, noise: float
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Every z from the input up; each layer before normalisation; and the logits."""
        hidden = _with_noise(rows, noise)
        normalised, before = [hidden], []
        for number, layer in enumerate(self.layers):
            before.append(layer(hidden))
            normalised.append(_with_noise(norms[number](before[-1]), noise))
            activation = self.affines[number](normalised[-1])
            hidden = activation.relu()
        return normalised, before, activation

    def _decode(self, noisy: list[Tensor], top: Tensor) -> list[Tensor]:
        """The estimate of every z from the input up, fp32, before it is normalised."""
        guesses: list[Tensor] = []
        for number in reversed(range(len(noisy))):
            if guesses:
                top = self.backs[number](guesses[-1].to(top.dtype))
            above = self.decoder_norms[number](top)
            guesses.append(self.combinators[number](noisy[number], above))
        return guesses[::-1]


class Affine(nn.Module):
    """gamma * (z + beta), number by number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, width]."""
        return self.gamma * (rows + self.beta)


class Combinator(nn.Module):
    """Estimate z from its noisy copy and from the layer above, element by element.

    (z~ - m(u)) v(u) + m(u) with m(u) = a1 sigmoid(a2 u + a3) + a4 u + a5 and v(u) = a6 sigmoid(a7 u
    + a8) + a9 u + a10, in fp32.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        start = torch.zeros(10, width)
        start[[1, 6]] = 1.0
        self.a = nn.Parameter(start)

    def forward(self, noisy: Tensor, above: Tensor) -> Tensor:
        """Both inputs, and the estimate, are [rows, width]."""
        a, z, u = self.a.float(), noisy.float(), above.float()
        mean = a[0] * (a[1] * u + a[2]).sigmoid() + a[3] * u + a[4]
        share = a[5] * (a[6] * u + a[7]).sigmoid() + a[8] * u + a[9]
        return (z - mean) * share + mean


def _plain_norm(width: int) -> GlobalBatchNorm:
    """BatchNorm without weights and running statistics: only training uses it."""
    return GlobalBatchNorm(width, affine=False, track_running_stats=False)


def _with_noise(rows: Tensor, noise: float) -> Tensor:
    return rows + noise * torch.randn_like(rows) if noise > 0 else rows
