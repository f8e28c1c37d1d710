"""Pi-model, temporal ensembling and ICT against float64 references of the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from hpdist.algorithms import ICT, Algorithm, PiModel, TemporalEnsembling
from hpdist.config.component import components
from tests.support.algorithm_runs import (
    Ran,
    cross_entropy,
    global_batch,
    run,
    softmax,
    squared_error,
)

CLASSES = 5
MAKERS: dict[str, Callable[[int], Algorithm]] = {
    "pi_model": lambda classes: PiModel(3.0, 4),
    "temporal_ensembling": lambda classes: TemporalEnsembling(classes, ramp_steps=4),
    "ict": lambda classes: ICT(ramp_steps=4, groups=4),
}


def sigmoid_ramp(step: int, steps: int) -> float:
    return math.exp(-5 * (1 - min(step / steps, 1)) ** 2)


def check_supervised(ran: Ran, labels: torch.Tensor) -> None:
    losses, slopes = cross_entropy(ran.arrays("logits")[0], np.eye(CLASSES)[labels.numpy()])
    assert ran.losses["supervised_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    np.testing.assert_allclose(
        ran.arrays("gradients")[0], slopes / len(losses), rtol=1e-4, atol=1e-7
    )


def check_consistency(ran: Ran, targets: np.ndarray, weight: float, known: np.ndarray) -> None:
    """The term of the student's second part, against targets, where they are known."""
    losses, slopes = squared_error(ran.arrays("logits")[1], targets)
    rows = max(len(losses), 1)
    expected = (losses * known).sum() / rows
    assert ran.losses["unsupervised_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    total = ran.losses["supervised_loss"] + weight * expected
    assert ran.losses["loss"] == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(
        ran.arrays("gradients")[1], weight * slopes * known[:, None] / rows, rtol=1e-3, atol=1e-7
    )
    assert (ran.arrays("gradients")[1][known == 0] == 0).all()


def test_pi_model_over_several_steps() -> None:
    algorithm = PiModel(3.0, 4)
    for step in range(7):
        batch = global_batch(algorithm, step)
        ran = run(algorithm, batch)
        check_supervised(ran, batch.labels)
        targets = softmax((batch.weak[0] @ batch.student).double().numpy())
        check_consistency(ran, targets, 3.0 * sigmoid_ramp(step, 4), np.ones(16))
        assert np.abs(ran.arrays("gradients")[1]).min(axis=1).max() > 0
    assert algorithm.state["step"] == 7


def test_temporal_ensembling_over_several_steps() -> None:
    algorithm = TemporalEnsembling(CLASSES, momentum=0.7, unsupervised_weight=2.0, ramp_steps=4)
    averages, counts = np.zeros((32, CLASSES)), np.zeros(32)
    rates = []
    for step in range(9):
        batch = global_batch(algorithm, step, unusable=(2, 11) if step % 2 else ())
        ran = run(algorithm, batch)
        check_supervised(ran, batch.labels)
        ids = batch.ids[batch.usable].numpy()
        known = (counts[ids] > 0).astype(float)
        targets = averages[ids] / (1 - 0.7 ** np.maximum(counts[ids], 1))[:, None]
        np.testing.assert_allclose(targets.sum(axis=1), known, atol=1e-12)
        check_consistency(ran, targets, 2.0 * sigmoid_ramp(step, 4), known)
        assert ran.losses["target_rate"] == pytest.approx(known.mean())
        rates.append(known.mean())
        said = softmax((batch.weak[0] @ batch.student).double().numpy())[batch.usable.numpy()]
        averages[ids] = 0.7 * averages[ids] + 0.3 * said
        counts[ids] += 1
        table = algorithm.state_dict()
        np.testing.assert_allclose(table["averages"][:32].numpy(), averages, atol=1e-6)
        np.testing.assert_array_equal(table["counts"][:32].numpy(), counts)
        assert table["counts"][32:].sum() == 0
    assert rates[0] == 0
    assert 0 < rates[1] < 1
    assert counts.max() > 3


def test_ict_over_several_steps() -> None:
    algorithm = ICT(alpha=0.5, unsupervised_weight=3.0, ramp_steps=4, groups=4)
    crossed = 0
    for step in range(6):
        batch = global_batch(algorithm, step, unusable=(9,))
        ran = run(algorithm, batch)
        check_supervised(ran, batch.labels)
        rows = batch.weak[0][batch.usable].double().numpy()
        groups = np.arange(16)[batch.usable.numpy()] // 4
        partners, shares = (ran.context[name].numpy() for name in ("partners", "shares"))
        np.testing.assert_array_equal(groups[partners], groups)
        np.testing.assert_array_equal(np.sort(partners), np.arange(15))
        share = shares.astype(float)[:, None]
        mixed = share * rows + (1 - share) * rows[partners]
        np.testing.assert_allclose(ran.arrays("inputs")[1], mixed, atol=1e-6)
        teacher = softmax(rows @ batch.target.double().numpy())
        targets = share * teacher + (1 - share) * teacher[partners]
        check_consistency(ran, targets, 3.0 * sigmoid_ramp(step, 4), np.ones(15))
        crossed += (partners != np.arange(15)).sum()
    assert crossed > 30
    assert len({*shares}) == 15


CHANGES: list[tuple[Callable[..., Algorithm], dict[str, float | bool]]] = [
    (PiModel, {"unsupervised_weight": 7.0}),
    (PiModel, {"ramp_steps": 9}),
    (partial(TemporalEnsembling, CLASSES), {"unsupervised_weight": 7.0}),
    (partial(TemporalEnsembling, CLASSES), {"ramp_steps": 9}),
    (partial(TemporalEnsembling, CLASSES), {"momentum": 0.9}),
    (ICT, {"unsupervised_weight": 7.0}),
    (ICT, {"ramp_steps": 9}),
    (ICT, {"alpha": 0.2}),
    (ICT, {"groups": 2}),
]


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_every_option_changes_the_loss(
    make: Callable[..., Algorithm], change: dict[str, float | bool]
) -> None:
    plain, other = make(), make(**change)
    ran = [(run(plain, b), run(other, b)) for b in (global_batch(plain, step) for step in range(6))]
    differences = [abs(one.losses["loss"] - two.losses["loss"]) for one, two in ran]
    assert max(differences) > 1e-3


def test_configs_build_what_they_say() -> None:
    for name in MAKERS:
        config = components("algorithm")[name]
        options = {
            k: f.default for k, f in config.model_fields.items() if k not in ("name", "ramp")
        }
        algorithm = config(name=name, ramp=0.1).build(CLASSES, steps=250)
        assert algorithm.ramp_steps == 25
        assert algorithm.paper
        built = {**vars(algorithm), "half_table": algorithm.__dict__.get("half_table", False)}
        assert {key: built[key] for key in options} == options


def test_the_table_grows_by_doubling_and_takes_large_ids() -> None:
    algorithm = TemporalEnsembling(CLASSES)
    assert len(algorithm.state_dict()["counts"]) == 0
    lengths = []
    for step, highest in enumerate([3, 1023, 1024, 2050, 40_000]):
        batch = global_batch(algorithm, step, unlabeled=4)
        ids = torch.tensor([highest, 0, 1, 2])
        run(algorithm, replace(batch, ids=ids))
        lengths.append(len(algorithm.state_dict()["averages"]))
        assert algorithm.state_dict()["counts"][highest] == 1
    assert lengths == [1024, 1024, 2048, 4096, 40_001]
    assert algorithm.state_dict()["counts"].sum() == 20
    assert algorithm.state_dict()["counts"].nonzero().flatten().tolist() == [
        *(0, 1, 2, 3, 1023, 1024, 2050, 40_000)
    ]


def test_an_id_of_more_than_24_bits_arrives_whole() -> None:
    algorithm = TemporalEnsembling(2)
    batch = replace(global_batch(algorithm, unlabeled=2, classes=2))
    ids = torch.tensor([2**24 + 1, 2**24 - 1])
    run(algorithm, replace(batch, ids=ids), ranks=2)
    assert torch.equal(algorithm.state_dict()["counts"].nonzero().flatten(), ids.sort().values)


def test_a_row_that_comes_twice_in_a_batch_counts_once() -> None:
    one, other = TemporalEnsembling(CLASSES), TemporalEnsembling(CLASSES)
    batch = global_batch(one, unlabeled=4)
    run(one, replace(batch, ids=torch.tensor([5, 9, 5, 1])))
    run(other, replace(batch, ids=torch.tensor([6, 9, 5, 1])))
    assert one.state_dict()["counts"].sum() == 3
    assert torch.equal(one.state_dict()["averages"][5], other.state_dict()["averages"][5])


def test_a_table_of_half_the_memory() -> None:
    half, full = TemporalEnsembling(CLASSES, half_table=True), TemporalEnsembling(CLASSES)
    for step in range(6):
        batch = global_batch(full, step)
        narrow, wide = run(half, batch), run(full, batch)
        assert narrow.losses == pytest.approx(wide.losses, rel=1e-2, abs=1e-6)
        assert narrow.gradients[1].dtype == torch.float32
    table = half.state_dict()["averages"]
    assert table.dtype == torch.float16
    difference = table.float() - full.state_dict()["averages"]
    assert 0 < difference.abs().max() < 2e-3
