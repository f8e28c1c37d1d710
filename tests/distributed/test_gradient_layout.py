"""No model of ours makes DDP warn of its gradients' strides; what is computed stays the same."""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator
from torch import nn

from hpdist.engines.gradient_layout import keep_strides
from hpdist.engines.prepare import make_engine, prepare
from tests.support.ranks import run_ranks

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_model() -> nn.Module:
    """Convolutions of 1 x 1, of one channel in, and of one channel in for each out."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 1, 3),
        nn.Conv2d(1, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def warned_of() -> list[str]:
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_engine(accelerator, *prepare(accelerator, model, optimizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            inputs = INPUTS.contiguous(memory_format=torch.channels_last)
            engine.backward(engine.forward(inputs).square().mean())
            engine.step(None, None)
    return [str(w.message) for w in caught if "strides" in str(w.message)]


def test_ddp_does_not_warn_of_strides() -> None:
    assert run_ranks(2, warned_of) == [[], []]


def test_the_gradients_are_those_without() -> None:
    found = []
    for keep in (False, True):
        model = make_model()
        if keep:
            keep_strides(model.parameters())
        inputs = INPUTS.contiguous(memory_format=torch.channels_last)
        model(inputs).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        if keep:
            assert all(p.grad.stride() == p.stride() for p in model.parameters() if 1 in p.shape)
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)
