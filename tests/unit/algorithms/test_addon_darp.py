"""DARP's refinement, and its tables over several steps, against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from hpdist.algorithms import (
    DARP,
    Algorithm,
    FixMatch,
)
from hpdist.algorithms.addons.base import build_algorithm
from hpdist.algorithms.addons.darp import DARPConfig, refined
from hpdist.config.component import components
from hpdist.errors import ConfigError
from tests.support.addon_references import (
    CLASSES,
    COUNTS,
    MAKERS,
    REFERENCES,
    batch_of,
    check,
    said,
    told,
)
from tests.support.algorithm_runs import (
    global_batch,
    run,
    softmax,
)


def aligned(said: np.ndarray, amounts: np.ndarray, alpha: float, rounds: int) -> np.ndarray:
    """DARP's refinement of a table, classes solved by halving intervals."""
    q = np.zeros_like(said)
    for c, amount in enumerate(amounts):
        top = np.argsort(-said[:, c], kind="stable")[: max(int(alpha * amount), 1)]
        q[top, c] = said[top, c] * amount / said[top, c].sum()
    q = (q + 1e-6) / (q + 1e-6).sum(axis=1, keepdims=True)
    h = -(q * np.log(q)).sum(axis=1)
    nu, logs = np.zeros(len(amounts)), np.log(q)

    def log_sum(values: np.ndarray, axis: int) -> np.ndarray:
        top = values.max(axis=axis, keepdims=True)
        return np.log(np.exp(values - top).sum(axis=axis)) + top.squeeze(axis)

    for _ in range(rounds):
        rows = -log_sum(logs - np.outer(h, nu), 1)
        for c, amount in enumerate(amounts):
            low, high = -1e7, 1e7
            for _ in range(100):
                nu[c] = (low + high) / 2
                more = log_sum(logs[:, c] + rows - nu[c] * h, 0) > np.log(amount)
                low, high = (nu[c], high) if more else (low, nu[c])
    x = logs - np.outer(h, nu)
    return np.exp(x - log_sum(x, 1)[:, None])


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(
    ("rows", "alpha", "rounds"), [(60, 2.0, 10), (60, 0.7, 1), (5, 4.0, 3), (5, 0.7, 3)]
)
def test_refinement_by_the_formula(rows: int, sharpness: float, alpha: float, rounds: int) -> None:
    noise = np.random.default_rng(rows)
    said = softmax(sharpness * noise.normal(size=(rows, CLASSES)) + np.arange(CLASSES))
    amounts = rows * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    found = refined(torch.tensor(said), torch.tensor(amounts), alpha, rounds).numpy()
    np.testing.assert_allclose(found, aligned(said, amounts, alpha, rounds), rtol=1e-6, atol=1e-12)


def test_of_equal_rows_the_first_keep_a_class() -> None:
    said = np.tile(softmax(np.arange(CLASSES)[None] / 3), (300, 1))
    amounts = 300 * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    found = refined(torch.tensor(said), torch.tensor(amounts), 1.0, 5).numpy()
    np.testing.assert_allclose(found, aligned(said, amounts, 1.0, 5), rtol=1e-6, atol=1e-12)
    assert found[0, 4] > 10 * found[20, 4]


def test_refinement_is_the_nearest_table_with_the_sums() -> None:
    """Where (log x - log q) / H(q) is one number for each row plus one for each class."""
    said = softmax(2 * np.random.default_rng(0).normal(size=(50, CLASSES)) + np.arange(CLASSES))
    amounts = 50 * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    x = refined(torch.tensor(said), torch.tensor(amounts), 100.0, 500).numpy()
    np.testing.assert_allclose(x.sum(axis=1), 1)
    np.testing.assert_allclose(x.sum(axis=0), amounts, rtol=1e-9)
    q = said * amounts / said.sum(axis=0) + 1e-6
    q /= q.sum(axis=1, keepdims=True)
    pulled = np.log(x / q) / -(q * np.log(q)).sum(axis=1)[:, None]
    of_classes = pulled - pulled[:, :1]
    np.testing.assert_allclose(of_classes, of_classes[:1].repeat(50, axis=0), atol=1e-6)
    assert np.ptp(of_classes[0]) > 0.1


@pytest.mark.parametrize("sharpness", [0.0, 1e4])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_refinement_of_extremes_is_finite(rows: int, sharpness: float) -> None:
    said = torch.randn(rows, CLASSES, dtype=torch.float64) * sharpness
    said[:, 0] += sharpness
    amounts = torch.tensor([1e-9, 0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    found = refined(said.softmax(dim=1), rows * amounts / amounts.sum(), 2.0, 10)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(rows, dtype=torch.float64))


SHARES = np.maximum(COUNTS, 0.5) / np.maximum(COUNTS, 0.5).sum()


@pytest.mark.parametrize("name", list(MAKERS))
def test_darp(name: str) -> None:
    algorithm = told(
        DARP(MAKERS[name](), CLASSES, warmup_steps=3, every=2, alpha=1.5, iterations=4)
    )
    reference = REFERENCES[name]()
    table: dict[int, np.ndarray] = {}
    targets: dict[int, np.ndarray] = {}
    rates = []
    for step in range(9):
        batch = batch_of(algorithm, step)
        if step == 6:
            batch.ids[3] = batch.ids[2]
            batch.ids[8], batch.ids[9] = 5000, 1024  # beyond the table as it is
        if step == 8:
            batch.ids[5] = 7000
        ran = run(algorithm, batch)
        seen = said(batch, ran)
        ids = batch.ids[batch.usable].tolist()
        means = np.mean([softmax(view) for view in seen.weak], axis=0)
        known = np.array([row in targets for row in ids])
        for view in seen.weak:
            for line in known.nonzero()[0]:
                view[line] = np.log(np.maximum(targets[ids[line]], 1.2e-38))
        check(ran, reference(seen, batch))
        rates.append(known.mean())
        assert ran.losses["refined_rate"] == pytest.approx(rates[-1], abs=1e-6)
        table |= dict(zip(ids, means, strict=True))
        if step in (2, 4, 6, 8):  # after steps 3, 5, 7 and 9
            rows = sorted(table)
            found = aligned(np.stack([table[row] for row in rows]), len(rows) * SHARES, 1.5, 4)
            targets = dict(zip(rows, found, strict=True))
    assert rates[:3] == [0, 0, 0]
    assert 0 < rates[3] < 1
    state = algorithm.state_dict()
    assert state["darp.step"] == 9
    held = state["darp.refined"].numpy()
    assert sorted(held.sum(axis=1).nonzero()[0]) == sorted(targets)
    for row, expected in targets.items():
        np.testing.assert_allclose(held[row], expected, rtol=1e-3, atol=1e-6)


def test_darp_goes_on_with_other_ranks_from_its_state() -> None:
    def make() -> Algorithm:
        return told(DARP(MAKERS["freematch"](), CLASSES, warmup_steps=2, every=2))

    whole, first, second = make(), make(), make()
    for step in range(8):
        batch = batch_of(whole, step)
        expected = run(whole, batch)
        part, ranks = (first, 2) if step < 5 else (second, 4)
        if step == 5:
            second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
        found = run(part, batch, ranks)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert (found.losses["refined_rate"] > 0) == (step > 1)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    state = second.state_dict()
    with pytest.raises(KeyError, match=r"darp\.refined"):
        second.load_state_dict({k: v for k, v in state.items() if k != "darp.refined"})


def test_darp_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="PseudoLabel makes none from weak views"):
        build_algorithm(components("algorithm")["pseudo_label"](), [DARPConfig()], CLASSES)
    with pytest.raises(ValidationError, match="must be positive for every class"):
        DARPConfig(distribution=[0.5, 0.5, 0.0])
    algorithm = DARPConfig(distribution=[2, 1, 1]).build(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="distribution: 3 numbers for 5 classes"):
        run(algorithm, global_batch(algorithm, 0))
    missing = DARP(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="DARP needs the number of labelled rows"):
        run(missing, global_batch(missing, 0))
