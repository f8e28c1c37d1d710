"""Which layers multiply in fp8, and the reason where none can."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from hpdist.engines import launch
from hpdist.engines.config import ExecutionRequest
from hpdist.errors import ConfigError
from hpdist.models.fp8 import check_fp8, fp8_layers, to_fp8
from hpdist.models.with_heads import WithHeads


def test_hidden_layers_of_fitting_sizes_are_chosen() -> None:
    body = nn.Sequential()
    body.first = nn.Linear(20, 32)
    body.second = nn.Linear(32, 64)
    body.block = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 40))
    body.convolution = nn.Conv1d(16, 16, 1)
    body.attention = nn.MultiheadAttention(32, 2)  # its projection reads the weight itself
    body.classifier = nn.Linear(32, 16)
    model = WithHeads(body, nn.ModuleDict({"rotation": nn.Linear(32, 16)}), features=None)
    assert fp8_layers(model) == ["model.second", "model.block.0"]
    with pytest.raises(ConfigError, match="multiples of 16; use bf16"):
        to_fp8(nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 16)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_machine_without_a_gpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.9 or higher .* no GPU is visible"):
        launch.resolve(ExecutionRequest(precision="fp8"))


def test_an_older_gpu_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"this one has 8\.0; use bf16"):
        check_fp8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "hpdist\[fp8\]"'):
        check_fp8()


def learns(device: str, *, emulate: bool) -> None:
    pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
    names = [name for name, _ in model.named_parameters()]
    inputs = torch.randn(23, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        plain = model(inputs)
        assert "1 linear layer;" in to_fp8(model, emulate=emulate)
        outputs = model(inputs)
    assert [name for name, _ in model.named_parameters()] == names
    assert 0 < (outputs - plain).norm() < 0.1 * plain.norm()
    outputs.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_layer_learns_in_what_fp8_rounds_to() -> None:
    learns("cpu", emulate=True)


@pytest.mark.gpu
def test_a_layer_learns_in_fp8() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    learns("cuda", emulate=False)
