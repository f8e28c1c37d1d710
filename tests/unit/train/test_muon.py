"""Muon and AdamW as one optimizer: the formula, who gets which parameter, the state of both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hpdist.errors import ConfigError
from hpdist.models.output_layers import mark_output_layer
from hpdist.models.with_heads import WithHeads
from hpdist.train.muon import hidden_matrices, refuse_sharded
from hpdist.train.optim import Optim, build_optimizer

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic iteration
LR, DECAY, MOMENTUM = 0.1, 1.0, 0.9


def orthogonalized(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations X <- aX + b(XX')X + c(XX')^2 X, in fp64."""
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def differentiate(model: nn.Module, step: int) -> None:
    model.zero_grad()
    torch.manual_seed(100 + step)
    model(torch.randn(16, 6)).square().mean().backward()


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_two_steps_are_those_of_the_formula(adjust: str) -> None:
    model = model_of()
    settings = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "adamw_lr_factor": 0.5}
    optimizer = build_optimizer(model, Optim(name="muon", adjust_lr_fn=adjust, **settings))
    others = [p for n, p in model.named_parameters() if n not in ("0.weight", "2.weight")]
    twin = copy.deepcopy(others)
    decays = [{"params": [p], "weight_decay": DECAY if p.dim() == 2 else 0.0} for p in twin]
    reference = torch.optim.AdamW(decays, lr=LR / 2)
    weights = {n: model.get_parameter(n).detach().double() for n in ("0.weight", "2.weight")}
    average = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(2):
        for parameter in model.parameters():  # of full rank: bf16 has no say in the directions
            parameter.grad = torch.randn_like(parameter)
        for own, other in zip(others, twin, strict=True):
            other.grad = own.grad.clone()
        for name, weight in weights.items():
            gradient = model.get_parameter(name).grad.double()
            average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * gradient
            update = orthogonalized((1 - MOMENTUM) * gradient + MOMENTUM * average[name])
            a, b = weight.shape
            factor = max(1, a / b) ** 0.5 if adjust == "original" else 0.2 * max(a, b) ** 0.5
            weights[name] = weight * (1 - LR * DECAY) - LR * factor * update
        optimizer.step()
        reference.step()
    for name, weight in weights.items():
        moved = model.get_parameter(name).detach().double()
        update = weight - model_of().get_parameter(name).detach()
        assert (moved - weight).norm() < 0.05 * update.norm()  # torch iterates in bf16
    torch.testing.assert_close(others, twin)


def test_embeddings_heads_norms_and_convolutions_are_left_to_adamw() -> None:
    body = nn.Sequential()
    body.embedding = nn.Embedding(5, 4)
    body.convolution = nn.Conv1d(4, 4, 3)
    body.attention = nn.MultiheadAttention(4, 2)
    body.hidden = nn.Linear(4, 4)
    body.norm = nn.LayerNorm(4)
    body.position = nn.Parameter(torch.zeros(7, 4))
    body.classifier = nn.Linear(4, 2)
    heads = nn.ModuleDict({"rotation": nn.Linear(4, 4)})
    model = WithHeads(body, heads, features=None)
    names = {id(p): n.removeprefix("model.") for n, p in model.named_parameters()}

    def chosen() -> list[str]:
        return [names[id(parameter)] for parameter in hidden_matrices(model)]

    usual = ["attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"]
    assert chosen() == usual
    body.hidden.weight.use_muon = False
    body.position.use_muon = True
    assert chosen() == ["position", *usual[:2]]
    body.norm.weight.use_muon = True
    with pytest.raises(ConfigError, match=r"norm\.weight has use_muon = True and 1 dimensions"):
        hidden_matrices(model)


def test_the_output_layer_is_the_one_that_runs_last() -> None:
    turned = Turned()
    assert hidden_matrices(turned) == [turned.last.weight]  # as far as the definition goes
    mark_output_layer(turned, torch.zeros(2, 6))
    assert hidden_matrices(turned) == [turned.hidden.weight]


class Turned(nn.Module):
    """A model that defines its output layer before its hidden one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.hidden = nn.Linear(6, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.hidden(inputs).tanh())  # type: ignore[no-any-return]


def test_a_frozen_matrix_is_not_trained_and_a_model_without_any_is_refused() -> None:
    model = model_of()
    model[0].weight.requires_grad_(False)
    assert hidden_matrices(model) == [model[2].weight]
    with pytest.raises(ConfigError, match="has none"):
        build_optimizer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)), Optim(name="muon"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_where_it_cuts_matrices(stage: int) -> None:
    refuse_sharded(None)
    refuse_sharded(0)
    with pytest.raises(ConfigError, match=r"shard\.engine: fsdp2"):
        refuse_sharded(None, "fsdp2")
    with pytest.raises(ConfigError, match=f"zero.stage: {stage} cuts them"):
        refuse_sharded(stage)


def test_a_loaded_state_is_used() -> None:
    """As Accelerate does it, which replaces groups and state."""
    config = Optim(name="muon", lr=LR)
    whole, resumed = model_of(), model_of(1)
    optimizer, other = build_optimizer(whole, config), build_optimizer(resumed, config)
    for step in range(4):
        differentiate(whole, step)
        optimizer.step()
        if step == 1:
            resumed.load_state_dict(whole.state_dict())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step >= 2:
            differentiate(resumed, step)
            other.step()
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
