"""Noisy Student and CReST+ against float64 references of the papers' formulas."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from hpdist.algorithms import AlgorithmConfig, CReST, FixMatch, NoisyStudent
from hpdist.config.component import components
from hpdist.errors import CheckpointError, ConfigError
from tests.support.algorithm_runs import cross_entropy, global_batch, run, softmax
from tests.support.catalogue import SETTINGS

CLASSES, ROWS = 5, 40
COUNTS = torch.tensor([1.0, 16.0, 2.0, 8.0, 4.0])


def labels(seed: int = 0, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of three quarters of the rows, in another order, and what a teacher says of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(rows, generator=generator)[: rows * 3 // 4]
    logits = 3 * torch.randn(len(ids), CLASSES, generator=generator)
    return ids, logits.softmax(dim=1)


def noisy(**options: Any) -> NoisyStudent:
    algorithm = NoisyStudent(CLASSES, **{"threshold": 0.6, "unsupervised_weight": 2.0} | options)
    for seed in (1, 0):  # the later one counts
        for ids, said in zip(*(part.split(7) for part in labels(seed)), strict=True):
            algorithm.take_labels(ids, said)
    algorithm.begin_generation()
    return algorithm


@pytest.mark.parametrize("soft", [True, False])
def test_noisy_student(soft: bool) -> None:
    algorithm = noisy(soft=soft)
    table = np.zeros((ROWS, CLASSES))
    for seed in (1, 0):
        ids, said = labels(seed)
        table[ids.numpy()] = said.half().double().numpy()
    for step in range(3):
        batch = global_batch(algorithm, step)
        ran = run(algorithm, batch)
        found = table[batch.ids.numpy()]
        mask = found.max(axis=1) >= 0.6
        assert 0 < mask.sum() < len(mask)
        targets = found / np.maximum(found.sum(axis=1, keepdims=True), 0.5)
        if not soft:
            targets = np.eye(CLASSES)[found.argmax(axis=1)]
        losses, slopes = cross_entropy(ran.arrays("logits")[1], targets)
        expected = (losses * mask).sum() / len(mask)
        assert ran.losses["unsupervised_loss"] == pytest.approx(expected, rel=1e-5)
        assert ran.losses["mask_rate"] == pytest.approx(mask.mean())
        np.testing.assert_allclose(
            ran.arrays("gradients")[1],
            2.0 * slopes * mask[:, None] / len(mask),
            rtol=1e-3,
            atol=1e-7,
        )


def test_the_first_generation_learns_from_the_labels_alone() -> None:
    algorithm = NoisyStudent(CLASSES, threshold=0.0)
    ran = run(algorithm, global_batch(algorithm))
    assert ran.losses["unsupervised_loss"] == 0
    assert ran.losses["loss"] == ran.losses["supervised_loss"] > 0
    assert not ran.gradients[1].any()
    assert algorithm.generation == 0
    assert noisy().generation == 1


def test_noisy_students_state_goes_round() -> None:
    algorithm, other = noisy(), NoisyStudent(CLASSES, threshold=0.6, unsupervised_weight=2.0)
    other.load_state_dict(algorithm.state_dict())
    assert other.generation == 1
    batch = global_batch(algorithm, 4)
    assert run(algorithm, batch).losses == run(other, batch).losses


@pytest.mark.parametrize(
    "change", [{"threshold": 0.9}, {"soft": False}, {"unsupervised_weight": 1.0}]
)
def test_noisy_students_options_change_the_loss(change: dict[str, Any]) -> None:
    batch = global_batch(noisy())
    assert run(noisy(), batch).losses["loss"] != run(noisy(**change), batch).losses["loss"]


def crest(**options: Any) -> CReST:
    settings = {"generations": 3, "alpha": 2.0} | options
    algorithm = CReST(FixMatch(threshold=0.5), CLASSES, **settings)
    algorithm.class_counts = COUNTS
    return algorithm


def begin(algorithm: CReST, seed: int = 0) -> None:
    for ids, said in zip(*(part.split(7) for part in labels(seed)), strict=True):
        algorithm.take_labels(ids, said)
    algorithm.begin_generation()


def chosen(seed: int = 0, alpha: float = 2.0) -> dict[int, int]:
    """Row to label: of the l-th class (N_{C+1-l} / N_1)^(1/alpha), the most confident first."""
    ids, said = (part.numpy() for part in labels(seed))
    by_count = sorted(range(CLASSES), key=lambda label: -COUNTS[label].item())
    found = {}
    for place, label in enumerate(by_count):
        share = (COUNTS[by_count[-1 - place]] / COUNTS[by_count[0]]).item() ** (1 / alpha)
        rows = [row for row in range(len(ids)) if said[row].argmax() == label]
        rows.sort(key=lambda row: -said[row].max())
        found |= {int(ids[row]): label for row in rows[: round(share * len(rows))]}
    return found


@pytest.mark.parametrize("average", [{}, {"window": 2}, {"momentum": 0.7}], ids=str)
def test_crest(average: dict[str, Any]) -> None:
    algorithm = crest(**average)
    for generation in range(3):
        joined = chosen(generation) if generation else {}
        power = 1 - 0.5 * generation / 2
        prior = COUNTS.double().numpy() / COUNTS.sum().item()
        prior = prior**power / (prior**power).sum()
        mean = np.full(CLASSES, 1 / CLASSES)
        batches = [mean] * average.get("window", 128)
        for step in range(3):
            batch = global_batch(algorithm, 10 * generation + step)
            ran = run(algorithm, batch, 2)
            said = softmax((batch.weak[0] @ batch.student).double().numpy())
            targets = said * prior / mean
            targets /= targets.sum(axis=1, keepdims=True)
            mask = targets.max(axis=1) >= 0.5
            logits = ran.arrays("logits")
            losses, slopes = cross_entropy(logits[1], np.eye(CLASSES)[targets.argmax(axis=1)])
            assert ran.losses["unsupervised_loss"] == pytest.approx(
                (losses * mask).mean(), rel=1e-4
            )
            np.testing.assert_allclose(
                ran.arrays("gradients")[1], slopes * mask[:, None] / 16, rtol=1e-3, atol=1e-6
            )
            own = np.array([joined.get(int(row), -1) for row in batch.ids])
            count = 8 + (own >= 0).sum()
            x_losses, x_slopes = cross_entropy(logits[0], np.eye(CLASSES)[batch.labels.numpy()])
            u_losses, u_slopes = cross_entropy(logits[2], np.eye(CLASSES)[own.clip(0)])
            u_losses, u_slopes = u_losses * (own >= 0), u_slopes * (own >= 0)[:, None]
            expected = (x_losses.sum() + u_losses.sum()) / count
            assert ran.losses["supervised_loss"] == pytest.approx(expected, rel=1e-5)
            assert ran.losses["joined_rate"] == pytest.approx((own >= 0).mean())
            np.testing.assert_allclose(
                ran.arrays("gradients")[0], x_slopes / count, rtol=1e-3, atol=1e-6
            )
            np.testing.assert_allclose(
                ran.arrays("gradients")[2], u_slopes / count, rtol=1e-3, atol=1e-6
            )
            batches = [*batches[1:], said.mean(axis=0)]
            if "momentum" in average:
                mean = 0.7 * mean + 0.3 * said.mean(axis=0)
            else:
                mean = sum(batches) / len(batches)
        assert generation == 0 or ran.losses["joined_rate"] > 0
        begin(algorithm, generation + 1)


def test_all_of_the_rarest_class_joins_and_least_of_the_most_frequent() -> None:
    algorithm = crest()
    begin(algorithm)
    ids, said = labels()
    table = algorithm.state_dict()["crest.chosen"][ids, 0]
    given = said.argmax(dim=1)
    rates = [(table[given == label] > 0).float().mean().item() for label in range(CLASSES)]
    assert rates[0] == 1
    assert min(rates) == rates[1] < 0.5
    assert ((table == given + 1) | (table == 0)).all()


def test_a_window_of_crests_is_not_a_moving_average() -> None:
    saved = crest(momentum=0.999).state_dict()
    assert saved["crest.probability"].shape == (CLASSES,)
    with pytest.raises(CheckpointError, match=r"set addons: crest\.momentum to what it was"):
        crest().load_state_dict(saved)
    assert crest().state_dict()["crest.recent_probability"].shape == (128, CLASSES)


@pytest.mark.parametrize(
    "change", [{"alpha": 5.0}, {"smallest_power": 1.0}, {"momentum": 0.1}, {"window": 2}]
)
def test_crests_options_change_the_loss(change: dict[str, float]) -> None:
    losses = []
    for algorithm in (crest(), crest(**change)):
        begin(algorithm)
        losses.append(
            [run(algorithm, global_batch(algorithm, step)).losses["loss"] for step in range(3)]
        )
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["crmatch", "remixmatch"])
def test_heads_inside_crest_see_their_own_rows(name: str) -> None:
    """A head's last further input is the algorithm's own, whatever an add-on puts behind it."""
    config = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))[name]
    made = [config(name=name, **SETTINGS[name]).build(CLASSES, steps=40) for _ in range(2)]
    alone, inside = made[0], CReST(made[1], CLASSES, generations=2)
    inside.class_counts = COUNTS
    batch = global_batch(alone)
    found, expected = run(inside, batch), run(alone, batch)
    assert found.losses["rotation_loss"] == expected.losses["rotation_loss"] > 0


def test_what_crest_cannot_be_put_around_is_refused() -> None:
    with pytest.raises(ConfigError, match="already has generations"):
        CReST(NoisyStudent(CLASSES), CLASSES)
    algorithm = CReST(FixMatch(), CLASSES)
    with pytest.raises(ConfigError, match="class_counts"):
        run(algorithm, global_batch(algorithm))
