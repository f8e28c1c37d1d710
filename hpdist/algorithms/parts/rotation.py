"""The rotation task: rows are rotated by 0, 90, 180 or 270 degrees, and a head predicts which."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hpdist.algorithms.exchange import StudentInputs, StudentOutputs
from hpdist.algorithms.parts.projections import linear
from hpdist.data.structures import sent
from hpdist.errors import ConfigError
from hpdist.tasks.losses import hard_cross_entropy

HEAD = "rotation"
ANGLES = 4


def rotation_head(features: torch.Size) -> nn.Module:
    """Features to logits of the four angles."""
    return linear(features, ANGLES)


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate each image [rows, channels, side, side] left by its quarter turns, int64 [rows]."""
    turned = images
    for number in range(1, ANGLES):
        chosen = (turns == number).view(-1, 1, 1, 1)
        turned = torch.where(chosen, images.rot90(number, (2, 3)), turned)
    return turned


def add_rotated(inputs: StudentInputs, images: Tensor, name: str) -> StudentInputs:
    """Add a view of the unlabelled rows, each rotated, as the last further input.

    The turns are drawn for each row under the algorithm's name, and stored in the context as
    "turns". Raises ConfigError unless the rows are square images.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ConfigError(
            f"{name} rotates square images [rows, channels, side, side], and these are "
            f"{list(images.shape)}; set algorithm.rotation_weight to 0"
        )
    drawn = inputs.positions.noise(f"{name} rotation", 1)[:, 0]
    turns = sent((drawn * ANGLES).long(), images.device)
    context = {**inputs.context, "turns": turns}
    return replace(
        inputs, extra_inputs=(*inputs.extra_inputs, rotated(images, turns)), context=context
    )


def rotation_loss(outputs: StudentOutputs) -> Tensor:
    """Cross-entropy of the angles, a contribution to the mean over the unlabelled rows."""
    predicted = outputs.heads[HEAD].extra_inputs[-1]
    return hard_cross_entropy(predicted, outputs.context["turns"]).sum() / outputs.unlabeled_rows
