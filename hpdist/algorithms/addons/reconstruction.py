"""Reconstruction: the features of a corrupted row must determine the whole row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.positions import BatchPositions
from hpdist.data.structures import sent
from hpdist.errors import ConfigError

Mode = Literal["masked", "denoising"]


class Reconstruction(AddOn, name="reconstruction"):
    """Adds w mean (D(f(c(u))) - u)^2: a decoder reconstructs a weak view from its corrupted copy.

    f are the model's features, D has one hidden layer with ReLU. c sets numbers to 0, each with
    chance s (for images, squares), and the mean is over these, with their expected number: s times
    all numbers of the usable unlabelled rows. Or c adds noise, and the mean is over all numbers.

    The inner algorithm sees nothing of it. The decoder is a head, [rows, numbers of a row], whose
    last layer has `hidden` weights for every number of a row: it suits small inputs.
    """

    name: ClassVar[str] = "reconstruction"
    addon_paper: ClassVar[str] = "Vincent et al. 2008, ICML; He et al. 2022, arXiv:2111.06377"
    addon_needs: ClassVar[frozenset[str]] = frozenset()
    own_extra_inputs = 1
    defaults: ClassVar[str] = (
        "Values that suit standardised inputs of some hundred to a few thousand numbers."
    )

    mode: Mode = option(default="masked")
    """masked: numbers are set to 0 and must be reconstructed; denoising: noise is added and all
    numbers must be reconstructed."""
    share: float = option(default=0.5, gt=0, le=1)
    """Chance of a number, or of a square of an image, to be masked."""
    patch: int = option(default=4, ge=1)
    """Side of an image's squares, all channels alike; other inputs are masked number by number."""
    scale: float = option(default=0.3, gt=0)
    """Standard deviation of the noise of `denoising`."""
    weight: float = option(default=1.0, ge=0)
    """Weight of the term."""
    hidden: int = option(default=256, ge=1)
    """Width of the decoder's hidden layer."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.views = replace(self.base.views, weak=max(self.base.views.weak, 1))  # type: ignore[misc]
        self.head_names = (*self.base.head_names, self.name)

    @property
    def changes_inputs(self) -> bool:
        """Whether inputs change: it masks them or adds noise."""
        return True

    def own_heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The decoder; raises ConfigError unless a row is one tensor of a known shape."""
        shape = self.input_shape
        if shape is None:
            raise ConfigError(
                "the add-on reconstruction needs the shape of an input; hpdist.with_heads "
                "sets it for inputs of one tensor, or set algorithm.input_shape"
            )
        numbers = math.prod(shape)
        decoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(features), self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, numbers),
        )
        return {self.name: decoder}

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Mix as the inner algorithm does, then add the corrupted rows behind its inputs."""
        mixed = super().mix(inputs, weak)
        rows = inputs.weak[0]
        if not rows.is_floating_point():
            raise ConfigError(
                "the add-on reconstruction reconstructs floating-point inputs, and these "
                f"are {rows.dtype}"
            )
        corrupted, counted = self._corrupted(rows, inputs.positions)
        context = {"target": rows.float(), "counted": counted}
        return replace(
            mixed,
            extra_inputs=(*mixed.extra_inputs, corrupted),
            context={**mixed.context, **self._prefixed(context)},
        )

    def add(self, outputs: StudentOutputs, terms: LossTerms) -> LossTerms:
        """The inner algorithm's terms, and the decoder's."""
        target = outputs.context[self._key("target")].flatten(1)  # [unlabeled, numbers]
        counted = outputs.context[self._key("counted")].flatten(1)
        predicted = outputs.heads[self.name].extra_inputs[-1]
        share = self.share if self.mode == "masked" else 1.0
        expected = share * max(predicted.shape[1], 1) * outputs.unlabeled_rows
        errors = (predicted - target).square() * counted
        term = {f"{self.name}_loss": self.weight * errors.sum() / expected}
        return replace(terms, extras={**terms.extras, **term})

    def _corrupted(self, rows: Tensor, positions: BatchPositions) -> tuple[Tensor, Tensor]:
        """The corrupted rows, and which numbers to reconstruct, fp32 of the rows' shape."""
        shape = rows.shape[1:]
        if self.mode == "denoising":
            noise = positions.normal(self.name, math.prod(shape)).view(rows.shape)
            noise = sent(noise, rows.device)
            return (rows + self.scale * noise).to(rows.dtype), torch.ones_like(rows.float())
        cells = [-(-side // self.patch) for side in shape[1:]] if len(shape) == 3 else list(shape)
        drawn = positions.noise(self.name, math.prod(cells)).view(len(rows), *cells)
        masked = sent(drawn < self.share, rows.device)
        if len(shape) == 3:
            for dim in (1, 2):
                masked = masked.repeat_interleave(self.patch, dim=dim)
            masked = masked[:, None, : shape[1], : shape[2]].expand(rows.shape)
        return rows.masked_fill(masked, 0.0), masked.float()


ReconstructionConfig = Reconstruction.Config
