"""Steps of an algorithm on a global batch cut into slices, and the formulas of its parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpdist.algorithms import Algorithm
from hpdist.algorithms.positions import BatchPositions
from hpdist.testing.imitation import (
    FEATURES,
    GlobalBatch,
    Ran,
    global_batch,
    make_heads,
    run_step,
    with_nan,
)
from tests.support.algorithm_batches import softmax

__all__ = [
    "FEATURES",
    "GlobalBatch",
    "Ran",
    "check_rotation",
    "cross_entropy",
    "global_batch",
    "make_heads",
    "run",
    "softmax",
    "squared_error",
    "with_nan",
]


def run(algorithm: Algorithm, batch: GlobalBatch, ranks: int = 1, *, commit: bool = True) -> Ran:
    """Do one step, its global batch cut into the slices that so many ranks would have."""
    ran = run_step([algorithm], batch, ranks, commit=commit)
    assert not ran.problems, ran.problems
    return ran


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-sum_c t_c log p_c per row, and its gradient to the logits; targets are soft."""
    p = softmax(logits)
    return -(targets * np.log(p)).sum(axis=1), p * targets.sum(axis=1, keepdims=True) - targets


def squared_error(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean_c (p_c - t_c)^2 per row, and its gradient to the logits."""
    p = softmax(logits)
    slope = 2 * (p - targets) / p.shape[1]  # to p
    return ((p - targets) ** 2).mean(axis=1), p * (slope - (slope * p).sum(axis=1, keepdims=True))


def check_rotation(
    ran: Ran, batch: GlobalBatch, name: str, view: Tensor, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """That the last further input is a view with each row turned, and its head's gradient.

    Gives the turned rows, flattened, and the cross-entropy of each.
    """
    usable = batch.usable.nonzero().flatten()
    at = BatchPositions(torch.arange(0), usable, 0, len(batch.ids), seed=7, step=batch.step)
    turns = np.floor(4 * at.noise(f"{name} rotation", 1)[:, 0].numpy()).astype(int)
    assert len(set(turns)) > 2
    images = view[batch.usable].double().numpy()
    turned = [np.rot90(image[0], k).ravel() for image, k in zip(images, turns, strict=True)]
    *others, said = [part.detach().double().numpy() for part in ran.heads["rotation"]]
    assert said.shape == (len(turns), 4)
    errors, slopes = cross_entropy(said, np.eye(4)[turns])
    *none, found = ran.head_gradients["rotation"]
    assert len(none) == len(others)
    assert not any(part.any() for part in none)
    np.testing.assert_allclose(found, weight * slopes / len(turns), rtol=1e-3, atol=1e-7)
    return np.stack(turned), errors
