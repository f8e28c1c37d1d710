"""VAT: its directions, loss and gradients in float64, and what finding them must leave alone."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms import VAT, Algorithm, FixMatch, WeakOutputs
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.vat import VATConfig
from hpdist.errors import ConfigError
from hpdist.models import CNN
from tests.support.algorithm_batches import softmax
from tests.support.algorithm_runs import FEATURES, Ran, cross_entropy, global_batch, run
from tests.support.ranks import run_ranks
from tests.support.recipes import digits, global_batches, make_step, slice_of

CLASSES = 5


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def virtual_adversarial(
    rows: np.ndarray, noise: np.ndarray, model: np.ndarray, xi: float, times: int
) -> np.ndarray:
    """The power iteration for a linear model, whose gradient of KL(p || p') is (p' - p) W'."""
    direction, p = unit(noise), softmax(rows @ model)
    for _ in range(times):
        direction = unit((softmax((rows + xi * direction) @ model) - p) @ model.T)
    return direction


def divergence(logits: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(p || p') of each row, and its gradient to the logits of p'."""
    p, q = softmax(logits), softmax(other)
    return (p * (np.log(p) - np.log(q))).sum(axis=1), q - p


def entropy(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H(p, p) of each row, and its gradient to the logits."""
    p = softmax(logits)
    h = -(p * np.log(p)).sum(axis=1)
    return h, -p * (np.log(p) + h[:, None])


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("unusable", [(), (1, 4, 5, 6, 7)])
def test_vat_over_several_steps(
    times: int, entropy_weight: float, unusable: tuple[int, ...]
) -> None:
    algorithm = VAT(
        epsilon=0.7,
        xi=0.5,
        power_iterations=times,
        unsupervised_weight=2.0,
        entropy_weight=entropy_weight,
        ramp_steps=3,
    )
    for step in range(5):
        batch = global_batch(algorithm, step, unusable=unusable)
        ran = run(algorithm, batch)
        model, x = batch.student.double().numpy(), batch.labeled.double().numpy()
        usable = batch.usable.nonzero().flatten()
        rows, n = batch.weak[0][usable].double().numpy(), len(usable)
        positions = BatchPositions(torch.arange(8), usable, 8, 16, seed=7, step=step)
        noise = positions.normal("vat", FEATURES).double().numpy()
        perturbed = rows + 0.7 * virtual_adversarial(rows, noise, model, 0.5, times)
        supervised, slopes = cross_entropy(x @ model, np.eye(CLASSES)[batch.labels.numpy()])
        weight, kls = 2.0 * min(step / 3, 1), divergence(rows @ model, perturbed @ model)
        check(ran, 0, x, slopes / 8)
        check(ran, 1, perturbed, weight * kls[1] / n)
        total = supervised.mean() + weight * kls[0].mean()
        if entropy_weight:
            entropies = entropy(rows @ model)
            check(ran, 2, rows, entropy_weight * entropies[1] / n)
            assert np.abs(ran.arrays("gradients")[2]).sum() > 0
            expected = entropy_weight * entropies[0].mean()
            assert ran.losses["entropy_loss"] == pytest.approx(expected, rel=1e-4)
            total += expected
        assert len(ran.inputs) == (3 if entropy_weight else 2)
        assert bool(np.abs(ran.arrays("gradients")[1]).sum() > 0) == (step > 0)
        assert ran.losses["unsupervised_loss"] == pytest.approx(kls[0].mean(), rel=1e-4)
        assert ran.losses["loss"] == pytest.approx(total, rel=1e-4)
        assert ran.losses["lost_directions"] == 0
        assert algorithm.state_dict()["step"] == step + 1


def check(ran: Ran, part: int, inputs: np.ndarray, slopes: np.ndarray) -> None:
    np.testing.assert_allclose(ran.arrays("inputs")[part], inputs, atol=1e-4)
    np.testing.assert_allclose(ran.arrays("gradients")[part], slopes, rtol=2e-3, atol=1e-5)


def test_the_direction_changes_the_prediction_more_than_a_random_one() -> None:
    algorithm = VAT(epsilon=0.5, power_iterations=4)
    batch = global_batch(algorithm, 0, unlabeled=64)
    found = run(algorithm, batch).losses["unsupervised_loss"]
    rows, model = batch.weak[0].double().numpy(), batch.student.double().numpy()
    drawn = unit(np.random.default_rng(0).normal(size=(64, FEATURES)))
    random = divergence(rows @ model, (rows + 0.5 * drawn) @ model)[0].mean()
    assert found > 2 * random


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 2.0},
        {"xi": 1.0},
        {"power_iterations": 2},
        {"unsupervised_weight": 2.0},
        {"entropy_weight": 0.2},
        {"ramp": 0.5},
    ],
    ids=str,
)
def test_every_option_changes_the_loss(change: dict[str, float]) -> None:
    plain, other = (
        VATConfig(**{"ramp": 0.0} | options).build(CLASSES, steps=8)  # type: ignore[arg-type]
        for options in ({}, change)
    )
    batch = global_batch(plain, 0)
    assert abs(run(plain, batch).losses["loss"] - run(other, batch).losses["loss"]) > 1e-3


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_without_a_gradient_the_direction_stays_random(slope: float) -> None:
    algorithm = VAT(epsilon=2.0, ramp_steps=0)
    batch = global_batch(algorithm, 0)
    probed = inputs_of(batch.weak[0])
    weak = WeakOutputs(torch.zeros(16, CLASSES), batch.ids, positions=probed.positions)
    flat = torch.arange(CLASSES) * 1.0

    def model(rows: Tensor) -> Tensor:
        """Constant in the second half of the rows."""
        said = rows @ batch.student
        return torch.cat([said[:8], flat + slope * said[8:]])

    found = algorithm.perturb(probed, weak, model)
    noise = probed.positions.normal("vat", FEATURES).double().numpy()
    moves = (found.extra_inputs[0] - batch.weak[0]).double().numpy() / 2
    np.testing.assert_allclose(moves[8:], unit(noise)[8:], atol=1e-5)
    assert np.abs(moves[:8] - unit(noise)[:8]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(moves, axis=1), 1, rtol=1e-5)
    assert found.context["lost"].tolist() == [0.0] * 8 + [1.0] * 8


def test_the_log_says_how_many_directions_are_lost() -> None:
    algorithm = VAT()
    batch = global_batch(algorithm, 0)
    batch.student[:] = 0
    assert run(algorithm, batch).losses["lost_directions"] == 1
    batch.weak[0][:4] = float("nan")
    assert run(algorithm, batch).losses["lost_directions"] == 1


def test_a_tiny_and_a_huge_gradient_have_a_direction() -> None:
    for size in (1e-30, 1e30):
        algorithm = VAT(epsilon=1.0, xi=1e-3)
        batch = global_batch(algorithm, 0)
        inputs = inputs_of(batch.weak[0])
        weak = WeakOutputs(torch.zeros(16, 2), batch.ids, positions=inputs.positions)

        def model(rows: Tensor, size: float = size) -> Tensor:
            return _Scaled.apply(rows[:, :2], size)

        found = algorithm.perturb(inputs, weak, model)
        assert found.context["lost"].sum() == 0
        moves = found.extra_inputs[0] - batch.weak[0]
        torch.testing.assert_close(moves.norm(dim=1), torch.ones(16), rtol=1e-4, atol=1e-4)


class _Scaled(torch.autograd.Function):
    """The same, with a gradient of another size."""

    @staticmethod
    def forward(ctx, rows, size):
        ctx.size = size
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.sign() + 0.5) * ctx.size, None


def test_inputs_of_whole_numbers_are_refused() -> None:
    rows = torch.randint(100, (16, FEATURES))
    weak = WeakOutputs(torch.zeros(16, CLASSES), torch.arange(16))
    with pytest.raises(ConfigError, match=r"floating-point numbers, and these are torch\.int64"):
        VAT().perturb(inputs_of(rows), weak, lambda rows: rows.float()[:, :CLASSES])


def inputs_of(rows: Tensor) -> StudentInputs:
    """One micro-batch of unlabelled rows alone."""
    none = torch.arange(0)
    positions = BatchPositions(none, torch.arange(len(rows)), 0, len(rows), seed=3, step=0)
    return StudentInputs(rows[:0], none, (), (), (), (rows,), positions)


class _Watched(VAT):
    """Notes what of the model changes while it looks for directions."""

    model: nn.Module

    def perturb(self, inputs, weak, model):
        before = self._model_state()
        self.states: list[dict[str, Tensor]] = [before]
        found = super().perturb(inputs, weak, model)
        self.states.append(self._model_state())
        return found

    def _model_state(self) -> dict[str, Tensor]:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                state[f"gradient of {name}"] = parameter.grad.clone()
        for name, module in self.model.named_modules():
            if hasattr(module, "records"):
                state[f"passes of {name}"] = torch.tensor(len(module.records.batches))
        return state


def test_the_search_touches_nothing_of_the_model() -> None:
    algorithm = _Watched(ramp_steps=0, epsilon=1.0, power_iterations=2)
    step = make_step(algorithm, norm="batch")
    algorithm.model = step.engine.module
    for number in range(3):
        step(*global_batches(number))
        before, after = algorithm.states
        assert before.keys() == after.keys()
        assert not any(name.startswith("gradient") for name in after)
        assert any(name.startswith("passes") for name in after)
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


def test_the_search_leaves_gradients_alone_that_are_there() -> None:
    algorithm = _Watched(ramp_steps=0, epsilon=1.0)
    step = make_step(algorithm)
    algorithm.model = step.engine.module
    for parameter in algorithm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(*global_batches(0))
    before, after = algorithm.states
    assert sum(name.startswith("gradient") for name in after) > 10
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def statistics_after(algorithm: Algorithm) -> dict[str, Tensor]:
    """The running statistics of a model after two steps, at a learning rate of 0."""
    step = make_step(algorithm, norm="batch", lr=0.0)
    for number in range(2):
        step(*global_batches(number))
    return dict(step.engine.module.named_buffers())


def test_running_statistics_do_not_know_of_the_search() -> None:
    one, five = (
        # Of length almost 0, a perturbation shows in no statistics: only the number of passes can.
        statistics_after(VAT(ramp_steps=0, epsilon=1e-12, power_iterations=times))
        for times in (1, 5)
    )
    assert one
    for name, value in one.items():
        torch.testing.assert_close(five[name], value)


def collectives(name: str) -> dict[str, int]:
    """What a step communicates, by kind."""
    vat = VAT(ramp_steps=0, epsilon=1.0, power_iterations=3)
    algorithm = vat if name == "vat" else FixMatch(threshold=0.15)
    step = make_step(algorithm)
    counts: Counter[str] = Counter()
    for number in range(3):
        batches = [slice_of(b, step.engine.rank, 2) for b in global_batches(number)]
        if number == 0:
            step(*batches)  # DDP is setting itself up
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(*batches)
        names = (event.name for event in profile.events())
        counts.update(name for name in names if name.startswith("c10d::"))
    return dict(counts)


def test_the_search_communicates_nothing() -> None:
    with_search, without = (run_ranks(2, collectives, name)[0] for name in ("vat", "fixmatch"))
    assert sum(without.values()) >= 4  # in two steps: the sums, and the gradients
    assert with_search == without


HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    """A small CNN that knows digits, and rows for it."""
    torch.manual_seed(0)
    model = CNN(1, 8, 10, "group")
    images, labels = digits()
    rows = images.float() / 255
    rows = (rows - rows.mean()) / rows.std()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number in range(60):
        picked = torch.arange(number * 24, number * 24 + 24)
        F.cross_entropy(model(rows[picked]), labels[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, rows[-200:]


def directions(model: nn.Module, rows: Tensor, dtype: torch.dtype, xi: float) -> Tensor:
    """What VAT finds with a model of a precision, flat."""
    cast = copy.deepcopy(model).to(dtype)

    def probe(inputs: Tensor) -> Tensor:
        return cast(inputs.to(dtype)).float()

    inputs = inputs_of(rows)
    weak = WeakOutputs(probe(rows).detach(), torch.arange(len(rows)), positions=inputs.positions)
    found = VAT(epsilon=1.0, xi=xi).perturb(inputs, weak, probe)
    assert found.extra_inputs[0].dtype == torch.float32
    return (found.extra_inputs[0] - rows).flatten(1)


def test_half_precision_finds_the_direction_of_fp32(trained: tuple[nn.Module, Tensor]) -> None:
    model, rows = trained
    cosines = {}
    for xi in (1e-6, 1e-3, 0.1, 1.0):
        exact = directions(model, rows, torch.float32, xi)
        for dtype in HALVES:
            found = directions(model, rows, dtype, xi)
            cosines[xi, dtype] = float(F.cosine_similarity(found, exact).mean())
    for (xi, dtype), value in cosines.items():
        print(f"xi {xi:g} {dtype}: mean cosine {value:.3f}")
    assert VAT().xi == 0.1
    assert cosines[0.1, torch.float16] > 0.9
    assert cosines[0.1, torch.bfloat16] > 0.6
    for dtype in HALVES:
        assert abs(cosines[1e-6, dtype]) < 0.2
        assert cosines[1.0, dtype] > 0.95
    # In fp32 itself a step of 1e-6 is lost in the rounding.
    tiny, exact = (directions(model, rows, torch.float32, xi) for xi in (1e-6, 0.1))
    assert float(F.cosine_similarity(tiny, exact).mean()) < 0.5
