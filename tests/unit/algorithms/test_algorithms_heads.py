"""CRMatch over several steps, against its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpdist.algorithms import CRMatch
from tests.support.algorithm_runs import check_rotation, cross_entropy, global_batch, run, softmax

CLASSES = 5


def cosine(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """max(0, cos) of each pair of rows, and its gradient to the first."""
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b)]
    cos = (a * b).sum(axis=1, keepdims=True) / lengths[0] / lengths[1]
    slope = (b / lengths[1] - cos * a / lengths[0]) / lengths[0]
    return np.maximum(cos[:, 0], 0), np.where(cos > 0, slope, 0)


@pytest.mark.parametrize("unusable", [(), (0, 4, 5, 6, 7)])
def test_crmatch(unusable: tuple[int, ...]) -> None:
    algorithm = CRMatch(
        threshold=0.7, unsupervised_weight=0.8, distance_weight=0.6, rotation_weight=0.3, width=4
    )
    signs = []
    for step in range(4):
        batch = global_batch(algorithm, step, unlabeled=24, unusable=unusable)
        ran = run(algorithm, batch)
        model = batch.student.double().numpy()
        x = batch.labeled.flatten(1).double().numpy() @ model
        w, s = (
            view[batch.usable].flatten(1).double().numpy() @ model
            for view in (batch.weak[0], batch.strong[0])
        )
        n, q = len(w), softmax(w)
        mask = (q.max(axis=1) >= 0.7).astype(float)
        assert 0 < mask.mean() < 1
        supervised, x_slopes = cross_entropy(x, np.eye(CLASSES)[batch.labels.numpy()])
        losses, s_slopes = cross_entropy(s, np.eye(CLASSES)[q.argmax(axis=1)])
        unsupervised = (mask * losses).sum() / n
        slopes = [x_slopes / len(x), 0.8 * mask[:, None] * s_slopes / n, 0 * w, 0 * w]
        for found, wanted in zip(ran.arrays("gradients"), slopes, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)
        apart = [part.detach().double().numpy() for part in ran.heads["distance"]]
        assert [part.shape for part in apart] == [(len(x), 4), (n, 4), (n, 4), (n, 4)]
        near, s_slope = cosine(apart[1], apart[2])
        _, w_slope = cosine(apart[2], apart[1])
        signs += (near[mask > 0] > 0).tolist()
        scale = 0.6 * mask[:, None] / n
        none, found_s, found_w, turned = (g.numpy() for g in ran.head_gradients["distance"])
        assert not none.any()
        assert not turned.any()
        np.testing.assert_allclose(found_s, scale * s_slope, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(found_w, scale * w_slope, rtol=1e-3, atol=1e-7)
        np.testing.assert_array_equal(ran.inputs[2], batch.weak[0][batch.usable])
        images, turns = check_rotation(ran, batch, "crmatch", batch.weak[0], 0.3)
        np.testing.assert_allclose(ran.arrays("inputs")[3].reshape(images.shape), images)
        distance = (mask * near).sum() / n
        assert ran.losses["mask_rate"] == pytest.approx(mask.mean())
        assert ran.losses["unsupervised_loss"] == pytest.approx(unsupervised, rel=1e-4)
        assert ran.losses["distance_loss"] == pytest.approx(0.6 * distance, rel=1e-4)
        assert ran.losses["rotation_loss"] == pytest.approx(0.3 * turns.mean(), rel=1e-4)
        loss = supervised.mean() + 0.8 * unsupervised + 0.6 * distance + 0.3 * turns.mean()
        assert ran.losses["loss"] == pytest.approx(loss, rel=1e-4)
    assert 0 < np.mean(signs) < 1  # some are beyond a right angle


def test_terms_without_weight_have_neither_heads_nor_rows() -> None:
    whole = CRMatch(threshold=0.5)
    batch = global_batch(whole, 0)
    full = run(whole, batch).losses
    for without, left in (("distance", "rotation"), ("rotation", "distance")):
        weights: dict[str, Any] = {f"{without}_weight": 0.0}
        algorithm = CRMatch(threshold=0.5, **weights)
        assert algorithm.head_names == (left,)
        ran = run(algorithm, replace(batch, heads={left: batch.heads[left]}))
        assert len(ran.inputs) == 3
        assert ran.losses.keys() == full.keys() - {f"{without}_loss"}
        assert ran.losses[f"{left}_loss"] == pytest.approx(full[f"{left}_loss"])


def test_every_option_changes_the_loss() -> None:
    changes: dict[str, float] = {
        "threshold": 0.9,
        "unsupervised_weight": 2,
        "distance_weight": 2,
        "rotation_weight": 2,
        "width": 7,
    }
    for name, value in changes.items():
        found = []
        for options in ({}, {name: value}):
            algorithm = CRMatch(**{"threshold": 0.5, **options})  # type: ignore[arg-type]
            found.append(run(algorithm, global_batch(algorithm, 0)).losses["loss"])
        assert abs(found[0] - found[1]) > 1e-3, name
