"""The ladder network against an own one in float64, on one rank and on several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.algorithms import FixMatch, Ladder, Reconstruction
from hpdist.algorithms.ladder import LadderConfig
from hpdist.data.structures import cat
from hpdist.distributed.batch_norm import GlobalBatchNorm, batch_norms
from hpdist.engines.config import LossScale
from hpdist.errors import ConfigError
from hpdist.models import MLP, LadderMLP
from hpdist.models.with_heads import head_names_of, with_heads
from tests.support.algorithm_runs import cross_entropy, global_batch, run
from tests.support.ranks import run_ranks
from tests.support.recipes import LABELED, make_step, train

SIZES = (5, 4, 6, 3)
EPS = 1e-5


def make_model(noise: float = 0.3) -> LadderMLP:
    torch.manual_seed(1)
    model = LadderMLP(SIZES[0], list(SIZES[1:-1]), SIZES[-1], noise)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def inputs(rows: int = 12) -> Tensor:
    return torch.randn(rows, SIZES[0], generator=torch.Generator().manual_seed(2))


def doubles(model: LadderMLP) -> dict[str, Tensor]:
    """The parameters in float64, leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


def normed(rows: Tensor) -> Tensor:
    return (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + EPS).sqrt()


def reference(w: dict[str, Tensor], x: Tensor, noise: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Noisy logits, and the costs [rows, layers + 1]: algorithm 1 of the paper, line by line."""
    layers = len(SIZES) - 1
    noisy, hidden = [x + noise[0]], x + noise[0]
    for n in range(layers):
        noisy.append(normed(hidden @ w[f"layers.{n}.weight"].T) + noise[n + 1])
        said = w[f"affines.{n}.gamma"] * (noisy[-1] + w[f"affines.{n}.beta"])
        hidden = said.clamp(min=0)
    clean, hidden, mu, sigma = [x], x, [torch.zeros(())], [torch.ones(())]
    for n in range(layers):
        raw = hidden @ w[f"layers.{n}.weight"].T
        mu.append(raw.mean(dim=0))
        sigma.append((raw.var(dim=0, correction=0) + EPS).sqrt())
        clean.append((raw - mu[-1]) / sigma[-1])
        hidden = (w[f"affines.{n}.gamma"] * (clean[-1] + w[f"affines.{n}.beta"])).clamp(min=0)
    costs, guess = [], x
    for n in range(layers, -1, -1):
        top = said.softmax(dim=1) if n == layers else guess @ w[f"backs.{n}.weight"].T
        u = normed(top)
        a1, a2, a3, a4, a5, a6, a7, a8, a9, a10 = w[f"combinators.{n}.a"]
        m = a1 * torch.sigmoid(a2 * u + a3) + a4 * u + a5
        v = a6 * torch.sigmoid(a7 * u + a8) + a9 * u + a10
        guess = (noisy[n] - m) * v + m
        cost = (clean[n] - (guess - mu[n]) / sigma[n]) ** 2
        costs.insert(0, cost.mean(dim=1))
    return said, torch.stack(costs, dim=1)


def drawn(rows: int, std: float) -> list[Tensor]:
    torch.manual_seed(7)
    return [std * torch.randn(rows, size).double() for size in SIZES]


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_costs_and_gradients_in_float64(noise: float) -> None:
    model, x = make_model(noise).train(), inputs().requires_grad_()
    w, exact = doubles(model), inputs().double().requires_grad_()
    noises = drawn(len(x), noise)
    logits, costs = reference(w, exact, noises)
    torch.manual_seed(7)
    said = model(x)
    shapes = {name: tuple(tensor.shape) for name, tensor in said.items()}
    assert shapes == {"logits": (12, 3), "reconstruction": (12, 4)}
    said = torch.cat(list(said.values()), dim=1)
    torch.testing.assert_close(said.double(), torch.cat([logits, costs], 1), rtol=1e-4, atol=1e-5)
    for column in range(7):  # each by itself: no cost may be hidden by a larger one
        parts = (said[:, column], torch.cat([logits, costs], 1)[:, column])
        weights = torch.linspace(0.5, 2, 12)
        leaves = ([x, *model.parameters()], [exact, *w.values()])
        found, wanted = (
            torch.autograd.grad((part * weights).sum(), leaf, retain_graph=True, allow_unused=True)
            for part, leaf in zip(parts, leaves, strict=True)
        )
        for name, one, other in zip(["input", *w], found, wanted, strict=True):
            if other is None:
                assert one is None or not one.any(), name
                continue
            limit = 1e-4 * float(other.abs().max()) + 1e-6
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=limit, msg=name)
    assert bool((costs > 0).all())


def test_the_decoder_begins_as_the_paper_says() -> None:
    combinator = LadderMLP(5, [4], 3).combinators[1]
    noisy, above = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(combinator(noisy, above), torch.zeros(6, 4))
    assert combinator.a[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 1, 0, 0, 0]


def test_evaluation_is_clean() -> None:
    model = make_model()
    x = inputs()
    for _ in range(200):
        model.train()(x)
        for norm in model.modules():
            if isinstance(norm, GlobalBatchNorm):
                norm.commit()
    model.eval()
    said = model(x)
    assert said.shape == (12, 3)
    assert torch.equal(said, model(x))
    w, seen, hidden = doubles(model), x.double(), x.double()
    for n in range(3):
        norm, weight = model.clean_norms[n], w[f"layers.{n}.weight"].T
        raw, gamma, beta = seen @ weight, w[f"affines.{n}.gamma"], w[f"affines.{n}.beta"]
        mean, variance = raw.mean(dim=0), raw.var(dim=0)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-2, atol=1e-3)
        seen = (gamma * (normed(raw) + beta)).clamp(min=0)
        logits = gamma * ((hidden @ weight - mean) / (variance + EPS).sqrt() + beta)
        hidden = logits.clamp(min=0)
    torch.testing.assert_close(said.double(), logits, rtol=2e-2, atol=2e-2)
    names = {name for name, _ in model.named_buffers()}
    assert len(names) == 3 * 3
    assert all(name.startswith("clean_norms") for name in names)


def on_a_rank(rows: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    dist.init_process_group("gloo")
    return share(rows, dist.get_rank(), dist.get_world_size())


def share(rows: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What one rank says, and its part of the gradients."""
    model = make_model(0.0).train()
    bounds = [0, rows, 12] if ranks == 2 else [0, 12]
    x = inputs()[bounds[rank] : bounds[rank + 1]].requires_grad_()
    said = joined(model(x))
    weights = torch.linspace(0.5, 2, 12)[bounds[rank] : bounds[rank + 1]]
    loss = (said[:, 3:] * weights[:, None]).sum() + (said[:, :3] * weights[:, None]).sin().sum()
    gradients = torch.autograd.grad(loss, [x, *model.parameters()])
    if ranks > 1:
        for gradient in gradients[1:]:
            dist.all_reduce(gradient)
    return said.detach(), gradients[0], list(gradients[1:])


@pytest.mark.parametrize("rows", [6, 9, 0])
def test_two_ranks_are_one(rows: int) -> None:
    said, slopes, gradients = share(rows)
    results = run_ranks(2, on_a_rank, rows)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), said, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), slopes, rtol=1e-3, atol=1e-4)
    for _, _, found in results:
        for one, other in zip(found, gradients, strict=True):
            limit = 1e-4 * float(other.abs().max()) + 1e-6
            torch.testing.assert_close(one, other, rtol=1e-3, atol=limit)


def test_segments_are_normalised_apart() -> None:
    model, x = make_model(0.0).train(), inputs()
    apart = cat([model(x[:5]), model(x[5:])])
    for norm in model.modules():
        if isinstance(norm, GlobalBatchNorm):
            norm.virtual_batches = (5, 7)
    torch.testing.assert_close(model(x), apart)


@pytest.mark.parametrize("weights", [(2.0, 0.5), (3.0,), (4.0, 3.0, 2.0, 1.0)])
@pytest.mark.parametrize("unusable", [(), (1, 4, 5, 6, 7)])
def test_the_algorithm_weighs_every_layer(
    weights: tuple[float, ...], unusable: tuple[int, ...]
) -> None:
    algorithm = Ladder(weights)
    batch = global_batch(algorithm, 0, unusable=unusable)
    ran = run(algorithm, batch)
    n = int(batch.usable.sum())
    by_layer = np.array([*weights, *[weights[-1]] * 3])[:3]
    costs = ran.heads["reconstruction"][1].detach().double().numpy()  # of the unlabelled rows
    total = (costs.sum(axis=0) / n * by_layer).sum()
    logits = ran.arrays("logits")[0]
    supervised, slopes = cross_entropy(logits, np.eye(5)[batch.labels.numpy()])
    assert ran.losses["loss"] == pytest.approx(supervised.mean() + total, rel=1e-5)
    assert ran.losses["unsupervised_loss"] == pytest.approx(total, rel=1e-5)
    for layer in range(3):
        expected = costs[:, layer].mean()
        assert ran.losses[f"layer_{layer}_cost"] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(ran.gradients[0], slopes / 8, rtol=1e-3, atol=1e-7)
    assert not ran.gradients[1].any()
    labeled, unlabeled = ran.head_gradients["reconstruction"]
    assert not labeled.any()
    np.testing.assert_allclose(unlabeled, np.tile(by_layer / n, (n, 1)), rtol=1e-5)


def test_the_weights_are_those_of_the_config() -> None:
    assert LadderConfig().build(10).layer_weights == (1000.0, 10.0, 0.1)
    assert LadderConfig(layer_weights=[2]).build(10).layer_weights == (2.0,)
    with pytest.raises(ValueError, match="layer_weights"):
        LadderConfig(layer_weights=[])


def test_a_model_without_a_decoder_is_refused() -> None:
    message = r"Ladder needs the heads reconstruction, which the model has not; .* model\.name: lad"
    with pytest.raises(ConfigError, match=message):
        with_heads(MLP(64, [8], 10), Ladder(), torch.zeros(2, 1, 8, 8))


def test_its_outputs_and_those_of_heads_stand_side_by_side() -> None:
    algorithm = Reconstruction(Ladder(), hidden=4)

    class Named(Reconstruction):
        name = "image"

    named = Named(Ladder(), hidden=4)
    model = with_heads(LadderMLP(64, [8], 10), named, torch.zeros(2, 1, 8, 8))
    assert head_names_of(model) == ("reconstruction", "image")
    said = model.train()(torch.rand(4, 1, 8, 8))
    shapes = {name: tuple(tensor.shape) for name, tensor in said.items()}
    assert shapes == {"logits": (4, 10), "reconstruction": (4, 3), "image": (4, 64)}
    assert algorithm.heads_hint == Ladder.heads_hint


def ladder_run(options: dict[str, Any], noise: float = 0.0) -> list[dict[str, float]]:
    step = make_step(Ladder((10.0, 1.0, 0.1)), lr=0.05, **options)
    step.engine.module.noise = noise
    return train(step, 6)


@pytest.mark.slow
def test_curves_do_not_depend_on_ranks_and_half_precision_is_close() -> None:
    alone = ladder_run({})
    costs = [record["unsupervised_loss"] for record in alone]
    assert costs[-1] < 0.9 * costs[0]
    for ranks in (2, 4):
        found = run_ranks(ranks, ladder_run, {})[0]
        for one, other in zip(found, alone, strict=True):
            assert one == pytest.approx(other, rel=2e-4, abs=2e-6)
    options = {"precision": "fp16", "stage": 2, "loss_scale": LossScale(initial=256.0)}
    for noise in (0.0, 0.3):
        half = run_ranks(2, ladder_run, options, noise)[0]
        assert all(record["applied"] for record in half)
        assert all(np.isfinite(list(record.values())).all() for record in half)
        if noise == 0:
            losses = [[record["loss"] for record in curve] for curve in (half, alone)]
            assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_other_algorithms_can_train_it_too() -> None:
    torch.manual_seed(0)
    algorithm = FixMatch(threshold=0.1)
    model = LadderMLP(64, [8], 10)
    assert with_heads(model, algorithm, torch.zeros(2, 1, 8, 8)) is model


def joined(said: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(said.values()), dim=1)


def test_a_step_normalises_labelled_rows_apart() -> None:
    step = make_step(Ladder((1.0, 0.1)))
    model = step.engine.module
    model.noise = 0.0
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.register_forward_hook(
        lambda _, x, y: seen.append((x[0].detach(), joined(y).detach()))
    )
    (record,) = train(step, 1)
    hook.remove()
    ((rows, said),) = seen
    assert all(norm.virtual_batches is None for norm in batch_norms(model))
    step = make_step(Ladder((1.0, 0.1)))  # with the weights of before
    step.engine.module.noise = 0.0
    for first, last in ((0, LABELED), (LABELED, len(rows))):
        alone = joined(step.engine.module.train()(rows[first:last]))
        torch.testing.assert_close(said[first:last], alone, rtol=1e-4, atol=1e-4)
    together = joined(step.engine.module(rows))
    assert (said - together)[:LABELED].abs().max() > 0.01
    assert record["loss"] > 0


def test_it_learns_digits() -> None:
    step = make_step(Ladder((1.0, 0.1)), lr=0.05)
    curve = train(step, 80)
    assert curve[-1]["supervised_loss"] < 0.7 * curve[0]["supervised_loss"]
    assert curve[-1]["layer_0_cost"] < 0.7 * curve[0]["layer_0_cost"]
