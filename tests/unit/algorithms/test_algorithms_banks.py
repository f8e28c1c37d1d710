"""Banks of rows, and the algorithms that have one, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpdist.algorithms import Algorithm, CoMatch, SimMatch
from hpdist.algorithms.parts.banks import enqueued, in_use, log_shares, mean_of
from hpdist.algorithms.parts.tables import ids_of
from tests.support.algorithm_runs import GlobalBatch, Ran, cross_entropy, global_batch, run, softmax

CLASSES = 5


def bank_of(*steps: tuple[Sequence[float], Sequence[bool]], size: int = 5) -> list[float]:
    bank = torch.zeros(size, 1)
    for rows, valid in steps:
        new, usable = torch.tensor(rows)[:, None], torch.tensor(valid)
        (bank,) = enqueued([bank], bank[:, 0] > 0, [new], usable)
    return bank[:, 0].tolist()


def test_the_newest_rows_are_kept() -> None:
    first, second = ([1.0, 2.0, 3.0], [True, False, True]), ([4.0, 5.0], [True, True])
    assert bank_of(first) == [1, 3, 0, 0, 0]
    assert bank_of(first, second) == [4, 5, 1, 3, 0]
    assert bank_of(first, second, first) == [1, 3, 4, 5, 1]
    assert bank_of(first, size=1) == [1]
    assert bank_of(([float("nan")], [False]), second) == [4, 5, 0, 0, 0]


def test_rows_that_are_not_kept_make_room() -> None:
    bank, other = torch.arange(1.0, 5.0), torch.arange(8.0).view(4, 2)
    kept = torch.tensor([True, False, True, True])
    new = (torch.tensor([9.0]), torch.tensor([[7.0, 7.0]]))
    found = enqueued([bank, other], kept, new, torch.tensor([True]))
    assert found[0].tolist() == [9, 1, 3, 4]
    assert found[1].tolist() == [[7, 7], [0, 1], [4, 5], [6, 7]]


def test_empty_places_count_for_nothing() -> None:
    bank = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.0, 0.0]])
    assert in_use(bank).tolist() == [True, True, False]
    assert mean_of(bank).tolist() == pytest.approx([0.4, 0.6])
    assert mean_of(torch.zeros(3, 2)).tolist() == [0, 0]
    shares = log_shares(torch.tensor([[1.0, 2.0, 50.0]]), in_use(bank)).exp()
    np.testing.assert_allclose(shares[0, :2], softmax(np.array([1.0, 2.0])), rtol=1e-6)
    assert shares[0, 2] == 0
    assert log_shares(torch.randn(2, 3), torch.zeros(3).bool()).isfinite().all()


def embedded(head: nn.Module, rows: Tensor) -> np.ndarray:
    """What a projection says, by its weights."""
    first, second = (layer for layer in head.modules() if isinstance(layer, nn.Linear))
    x = rows.double().numpy()
    for layer in (first, second):
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if layer is first else x
    lengths: np.ndarray = np.linalg.norm(x, axis=1, keepdims=True)
    return x / lengths


def said(batch: GlobalBatch, view: Tensor, model: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits and embeddings of a view, of the rows that are usable."""
    rows = view[batch.usable] if len(view) == len(batch.usable) else view
    return rows.double().numpy() @ model.double().numpy(), embedded(batch.heads["projection"], rows)


def assert_gradients(found: Sequence[Tensor], wanted: Sequence[np.ndarray | None]) -> None:
    """None: nothing may arrive."""
    for gradient, expected in zip(found, wanted, strict=True):
        if expected is None:
            assert not gradient.any()
        else:
            assert np.abs(expected).sum() > 0
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


COMATCH: dict[str, Any] = {
    "threshold": 0.6,
    "unsupervised_weight": 0.8,
    "contrast_weight": 0.6,
    "smoothing": 0.7,
    "temperature": 0.3,
    "graph_threshold": 0.35,
    "width": 4,
    "bank": 50,
    "alignment_steps": 3,
}


@pytest.mark.parametrize("unusable", [(), (0, 4, 5, 6, 7)])
def test_comatch(unusable: tuple[int, ...]) -> None:
    algorithm = CoMatch(CLASSES, **COMATCH)
    memory: list[tuple[np.ndarray, np.ndarray]] = []
    means: list[np.ndarray] = []
    for step in range(5):
        batch = global_batch(algorithm, step, unusable=unusable if step != 2 else ())
        ran = run(algorithm, batch)
        x, z_x = said(batch, batch.labeled, batch.student)
        w, z_w = said(batch, batch.weak[0], batch.student)
        s, z_0 = said(batch, batch.strong[0], batch.student)
        _, z_1 = said(batch, batch.strong[1], batch.student)
        one_hot, p, n = np.eye(CLASSES)[batch.labels.numpy()], softmax(w), len(w)
        means = [p.mean(axis=0), *means][:3]
        p = p / np.mean(means, axis=0)
        p /= p.sum(axis=1, keepdims=True)
        q = p
        if memory:
            z_k, p_k = (np.stack(part) for part in zip(*memory, strict=True))
            q = 0.7 * p + 0.3 * softmax(z_w @ z_k.T / 0.3) @ p_k
        memory = [*zip(z_w, p, strict=True), *zip(z_x, one_hot, strict=True), *memory][:50]
        graph = q @ q.T
        np.fill_diagonal(graph, 1)
        graph[graph < 0.35] = 0
        assert n < (graph > 0).sum() < n * n
        graph /= graph.sum(axis=1, keepdims=True)
        mask = (q.max(axis=1) >= 0.6).astype(float)
        assert 0 < mask.mean() < 1
        supervised, x_slopes = cross_entropy(x, one_hot)
        losses, s_slopes = cross_entropy(s, q)
        contrast, z_slopes = cross_entropy(z_0 @ z_1.T / 0.3, graph)
        z_slopes *= 0.6 / n / 0.3
        unsupervised = (mask * losses).sum() / n
        s_slopes *= 0.8 * mask[:, None] / n
        assert_gradients(ran.gradients, [x_slopes / len(x), s_slopes, None])
        slopes = [None, z_slopes @ z_1, z_slopes.T @ z_0]
        assert_gradients(ran.head_gradients["projection"], slopes)
        assert ran.losses["mask_rate"] == pytest.approx(mask.mean())
        assert ran.losses["unsupervised_loss"] == pytest.approx(unsupervised, rel=1e-4)
        assert ran.losses["contrastive_loss"] == pytest.approx(0.6 * contrast.mean(), rel=1e-4)
        loss = supervised.mean() + 0.8 * unsupervised + 0.6 * contrast.mean()
        assert ran.losses["loss"] == pytest.approx(loss, rel=1e-4)
        check_bank(algorithm.state_dict(), "targets", memory)
        state = algorithm.state_dict()
        np.testing.assert_allclose(state["means"][: len(means)], np.stack(means), rtol=1e-4)
    assert len(memory) == 50


def check_bank(
    state: dict[str, Tensor], name: str, memory: Sequence[tuple[np.ndarray, Any]]
) -> None:
    """That it holds what is remembered, and nothing behind it."""
    for key, part in zip(("embeddings", name), zip(*memory, strict=True), strict=True):
        held = state[key].numpy()
        np.testing.assert_allclose(held[: len(memory)], np.stack(part), rtol=1e-4, atol=1e-6)
        assert not held[len(memory) :].any()


def test_comatch_without_a_graph_has_one_strong_view() -> None:
    algorithm = CoMatch(CLASSES, contrast_weight=0.0)
    assert algorithm.views.strong == 1
    assert not algorithm.uses_student_statistics
    assert "contrastive_loss" not in run(algorithm, global_batch(algorithm, 0)).losses


SIMMATCH: dict[str, Any] = {
    "threshold": 0.6,
    "unsupervised_weight": 0.8,
    "similarity_weight": 0.6,
    "smoothing": 0.7,
    "temperature": 0.3,
    "width": 4,
    "bank": 20,
    "alignment_steps": 3,
}


@pytest.mark.parametrize("unusable", [(), (0, 4, 5, 6, 7)])
def test_simmatch(unusable: tuple[int, ...]) -> None:
    algorithm = SimMatch(CLASSES, **SIMMATCH)
    memory: dict[int, tuple[np.ndarray, int]] = {}  # by id, the newest first
    means: list[np.ndarray] = []
    replaced = 0
    for step in range(6):
        batch = global_batch(algorithm, step, unusable=unusable if step != 2 else ())
        batch.labeled_ids[5] = batch.labeled_ids[2]
        ran = run(algorithm, batch)
        x, _ = said(batch, batch.labeled, batch.student)
        _, z_x = said(batch, batch.labeled, batch.target)
        w, z_w = said(batch, batch.weak[0], batch.target)
        s, z_s = said(batch, batch.strong[0], batch.student)
        one_hot, p, n = np.eye(CLASSES)[batch.labels.numpy()], softmax(w), len(w)
        means = [p.mean(axis=0), *means][:3]
        p = p / np.mean(means, axis=0)
        p /= p.sum(axis=1, keepdims=True)
        q, similarity, z_slopes = p, 0.0, None
        if memory:
            z_k, y_k = (np.stack(part) for part in zip(*memory.values(), strict=True))
            t = softmax(z_w @ z_k.T / 0.3)
            q = 0.7 * p + 0.3 * np.stack([t[:, y_k == c].sum(axis=1) for c in range(CLASSES)], 1)
            unfolded = t * p[:, y_k]
            unfolded /= unfolded.sum(axis=1, keepdims=True)
            errors, slopes = cross_entropy(z_s @ z_k.T / 0.3, unfolded)
            similarity, z_slopes = errors.mean(), 0.6 * slopes @ z_k / 0.3 / n
        mask = (q.max(axis=1) >= 0.6).astype(float)
        assert 0 < mask.mean() < 1
        supervised, x_slopes = cross_entropy(x, one_hot)
        losses, s_slopes = cross_entropy(s, q)
        unsupervised = (mask * losses).sum() / n
        s_slopes *= 0.8 * mask[:, None] / n
        assert_gradients(ran.gradients, [x_slopes / len(x), s_slopes])
        assert_gradients(ran.head_gradients["projection"], [None, z_slopes])
        assert ran.losses["mask_rate"] == pytest.approx(mask.mean())
        assert ran.losses["unsupervised_loss"] == pytest.approx(unsupervised, rel=1e-4)
        assert ran.losses["similarity_loss"] == pytest.approx(0.6 * similarity, rel=1e-4)
        loss = supervised.mean() + 0.8 * unsupervised + 0.6 * similarity
        assert ran.losses["loss"] == pytest.approx(loss, rel=1e-4)
        ids, labels = batch.labeled_ids.tolist(), batch.labels.tolist()
        new = {i: z for i, *z in zip(ids, z_x, labels, strict=True)}
        order = [i for at, i in enumerate(ids) if i not in ids[at + 1 :]]
        replaced += len(new.keys() & memory.keys())
        memory = {i: tuple(new[i]) for i in order} | {
            i: kept for i, kept in memory.items() if i not in new
        }
        memory = dict(list(memory.items())[:20])
        state = algorithm.state_dict()
        held = [(z, label + 1) for z, label in memory.values()]
        check_bank(state, "labels", held)
        assert ids_of(state["ids"])[: len(memory)].tolist() == list(memory)
    assert len(memory) == 20
    assert replaced > 2


def last_loss(algorithm: Algorithm) -> float:
    """Of the fourth step."""
    ran = Ran()
    for step in range(4):
        ran = run(algorithm, global_batch(algorithm, step))
    return ran.losses["loss"]


KINDS: list[tuple[Callable[..., Algorithm], dict[str, Any]]] = [
    (CoMatch, COMATCH),
    (SimMatch, SIMMATCH),
]


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [(make, options, name) for make, options in KINDS for name in options],
)
def test_every_option_changes_the_loss(
    make: Callable[..., Algorithm], options: dict[str, Any], name: str
) -> None:
    other = {
        "threshold": 0.3,
        "graph_threshold": 0.2,
        "smoothing": 0.3,
        "alignment_steps": 1,
        "bank": 7,
    }.get(name, 2 * options[name])
    changed = last_loss(make(CLASSES, **{**options, name: other}))
    assert abs(changed - last_loss(make(CLASSES, **options))) > 1e-3
