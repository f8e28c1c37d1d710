"""The reconstruction add-on: its term in float64, and that the algorithm inside knows nothing."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpdist.algorithms import (
    VAT,
    Algorithm,
    AlgorithmConfig,
    FixMatch,
    Reconstruction,
    Supervised,
)
from hpdist.algorithms.addons.reconstruction import ReconstructionConfig
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.positions import BatchPositions
from hpdist.config.component import components
from hpdist.errors import ConfigError
from hpdist.models import CNN, MLP
from hpdist.models.with_heads import with_heads
from tests.support import lockstep
from tests.support.algorithm_runs import FEATURES, global_batch, run
from tests.support.catalogue import SETTINGS
from tests.support.recipes import make_step, train

ALGORITHMS = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
ROWS = 16


def base(name: str, classes: int = 5) -> Algorithm:
    algorithm = ALGORITHMS[name](name=name, **SETTINGS.get(name, {})).build(classes, steps=40)
    algorithm.rows = 200
    return algorithm


@pytest.mark.parametrize("mode", ["masked", "denoising"])
@pytest.mark.parametrize("name", ["supervised", "fixmatch", "entropy_minimization", "vat", "ict"])
@pytest.mark.parametrize("unusable", [(), (1, 4, 5, 6, 7)])
def test_the_term_over_several_steps(mode: Any, name: str, unusable: tuple[int, ...]) -> None:
    inner, options = base(name), {"mode": mode, "share": 0.3, "scale": 0.6, "weight": 1.7}
    algorithm = Reconstruction(base(name), **options, hidden=9)
    for step in range(3):
        batch = global_batch(algorithm, step, unusable=unusable)
        ran = run(algorithm, batch)
        usable = batch.usable.nonzero().flatten()
        places = BatchPositions(torch.arange(8), usable, 8, ROWS, seed=7, step=step)
        rows = batch.weak[0][usable].double().numpy()
        if mode == "masked":
            counted = places.noise("reconstruction", FEATURES).numpy() < 0.3
            corrupted, expected = rows * ~counted, 0.3 * rows.size
            assert 0 < counted.mean() < 1
        else:
            noise = places.normal("reconstruction", FEATURES).double().numpy()
            counted, corrupted, expected = np.ones(rows.shape), rows + 0.6 * noise, rows.size
        np.testing.assert_allclose(ran.arrays("inputs")[-1], corrupted, atol=1e-6)
        said = [part.detach().double().numpy() for part in ran.heads["reconstruction"]]
        error = (said[-1] - rows) * counted
        term = 1.7 * (error**2).sum() / expected
        assert ran.losses["reconstruction_loss"] == pytest.approx(term, rel=1e-5)
        *others, own = ran.head_gradients["reconstruction"]
        np.testing.assert_allclose(own.numpy(), 1.7 * 2 * error / expected, rtol=1e-4, atol=1e-8)
        assert own.abs().sum() > 0
        assert not any(part.any() for part in others)
        assert not ran.gradients[-1].any()
        # The rest is what the algorithm inside makes by itself.
        batch.heads = {}
        alone = run(inner, batch)
        for found, wanted in zip(ran.gradients, alone.gradients, strict=False):
            assert torch.equal(found, wanted)
        assert len(alone.gradients) == len(ran.gradients) - 1
        assert ran.losses.pop("loss") == pytest.approx(alone.losses.pop("loss") + term, rel=1e-5)
        del ran.losses["reconstruction_loss"]
        assert ran.losses == alone.losses
        assert {k: float(v.sum()) for k, v in algorithm.state_dict().items()} == {
            k: float(v.sum()) for k, v in inner.state_dict().items()
        }


def corrupted(algorithm: Algorithm, rows: Tensor) -> Tensor:
    places = BatchPositions(torch.arange(0), torch.arange(len(rows)), 0, len(rows), seed=3, step=0)
    none = torch.arange(0)
    return algorithm.mix(
        StudentInputs(rows[:0], none, (), (), (), (rows,), places), None
    ).extra_inputs[-1]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 10)])
def test_squares_of_an_image_are_masked(shape: tuple[int, ...]) -> None:
    rows = torch.rand(64, *shape) + 0.5
    found = corrupted(Reconstruction(Supervised(), share=0.25, patch=4), rows) == 0
    assert float(found.float().mean()) == pytest.approx(0.25, abs=0.05)
    for row in found:
        assert (row == row[:1]).all()  # every channel alike
        for top in range(0, shape[1], 4):
            for left in range(0, shape[2], 4):
                assert len(row[:, top : top + 4, left : left + 4].unique()) == 1
    kept = corrupted(Reconstruction(Supervised(), share=0.25, patch=4), rows)
    assert torch.equal(kept[~found], rows[~found])


@pytest.mark.parametrize(
    "change",
    [{"mode": "denoising"}, {"share": 0.2}, {"weight": 2.0}, {"hidden": 8}],
    ids=str,
)
def test_every_option_changes_the_loss(change: dict[str, Any]) -> None:
    found = []
    for options in ({}, change):
        algorithm = ReconstructionConfig(**options).build(FixMatch(), 5)
        found.append(run(algorithm, global_batch(algorithm, 0)).losses["loss"])
    assert abs(found[0] - found[1]) > 1e-3


DENOISING: list[tuple[Any, float]] = [("denoising", 0.3), ("denoising", 0.4)]


def test_every_option_of_the_corruption_changes_it() -> None:
    rows = torch.randn(4, 1, 8, 8)
    for changes in ([{}, {"patch": 2}], [{"mode": m, "scale": s} for m, s in DENOISING]):
        one, other = (corrupted(Reconstruction(Supervised(), **c), rows) for c in changes)
        assert not torch.equal(one, other)


def test_a_supervised_run_learns_to_give_back_what_it_does_not_see() -> None:
    curves = {}
    for weight in (0.0, 1.0):
        algorithm = Reconstruction(Supervised(), patch=2, weight=weight, hidden=32)
        step = make_step(algorithm, lr=0.05)
        curves[weight] = train(step, 60)
        step.engine.module.eval()
        assert step.engine.infer(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    first, last = curves[1.0][0], curves[1.0][-1]
    assert last["reconstruction_loss"] < 0.7 * first["reconstruction_loss"]
    assert all(record["applied"] for record in curves[1.0])
    assert curves[0.0][-1]["reconstruction_loss"] == 0
    assert curves[0.0][-1]["loss"] != curves[1.0][-1]["loss"]


@pytest.mark.parametrize("name", ["supervised", "regmixmatch", "vat", "mixmatch", "mean_teacher"])
def test_accumulation_does_not_matter_around_any_algorithm(name: str) -> None:
    whole, cut = (
        make_step(
            Reconstruction(base(name, 10), mode="masked", patch=2, hidden=16),
            micro_batches=parts,
            smooth=True,
        )
        for parts in (1, 2)
    )
    recorded = lockstep.record(whole, range(4))
    assert lockstep.follow(cut, recorded) == {}
    assert all(record["reconstruction_loss"] > 0 for record in recorded.curve)


def test_two_of_them_around_one_another_and_around_further_inputs() -> None:
    class Other(Reconstruction):
        name = "other"

    algorithm = Other(Reconstruction(base("vat"), share=0.4), mode="denoising", weight=2.0)
    assert algorithm.head_names == ("reconstruction", "other")
    batch = global_batch(algorithm, 0)
    ran = run(algorithm, batch)
    assert len(ran.inputs) == 1 + 2 + 2
    flows = {k: [bool(g.any()) for g in v] for k, v in ran.head_gradients.items()}
    assert flows["reconstruction"] == [False, False, False, True, False]
    assert flows["other"] == [False, False, False, False, True]
    assert set(ran.context) >= {"reconstruction.target", "other.target", "lost"}


class _Watching(VAT):
    """Notes what it is shown."""

    def loss(self, outputs, student_sums):
        weak = outputs.weak
        self.shown = (len(outputs.extra_inputs), list(outputs.heads), list(weak.heads))
        return super().loss(outputs, student_sums)


def test_the_algorithm_inside_sees_its_own_inputs_alone() -> None:
    inner = _Watching()
    algorithm = Reconstruction(inner)
    run(algorithm, global_batch(algorithm, 0))
    assert inner.shown == (2, [], [])


def test_the_model_is_told_the_input_shape() -> None:
    algorithm = Reconstruction(Supervised(), hidden=7)
    model = with_heads(CNN(1, 4, 10, "group"), algorithm, torch.zeros(2, 1, 8, 6))
    assert algorithm.input_shape == (1, 8, 6)
    assert cast(nn.Module, model)(torch.rand(2, 1, 8, 6))["reconstruction"].shape == (2, 48)
    with pytest.raises(ConfigError, match=r"input_shape"):
        Reconstruction(Supervised()).heads(torch.Size([4]))


def test_inputs_may_be_large_but_not_whole_numbers() -> None:
    algorithm = Reconstruction(Supervised(), hidden=2)
    example = torch.zeros(2, 3, 224, 224)
    model = with_heads(MLP(150528, [2], 10), algorithm, example)
    assert cast(nn.Module, model)(example)["reconstruction"].shape == (2, 150528)
    with pytest.raises(ConfigError, match=r"floating-point inputs, and these are torch\.int64"):
        corrupted(algorithm, torch.ones(2, 5, dtype=torch.int64))
