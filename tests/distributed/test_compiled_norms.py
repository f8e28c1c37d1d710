"""A compiled model normalises as an eager one does, whole, whatever the ranks and sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hpdist.distributed.batch_norm import batch_norms, global_batch_norm
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.models import WideResNet
from hpdist.models.activation_checkpointing import checkpoint_activations
from tests.support.ranks import run_ranks


class Block(nn.Module):
    """Two normalised convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, 4]."""
        return self.layers(inputs).square().mean((2, 3))


def breaks(model: nn.Module, inputs: Tensor) -> list[str]:
    """Why the graph of a forward breaks."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(inputs)
    assert found.graph_break_count == len(found.break_reasons)
    return [reason.reason for reason in found.break_reasons]


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return global_batch_norm(Block()), torch.randn(4, 3, 8, 8)


def on_a_rank() -> tuple[list[str], list[str]]:
    dist.init_process_group("gloo")
    wide = global_batch_norm(WideResNet(3, 10, 10, 1))
    return breaks(*small()), breaks(wide, torch.randn(2, 3, 32, 32))


def test_one_process_has_one_graph() -> None:
    assert breaks(*small()) == []


@pytest.mark.slow
def test_each_rank_has_one_graph() -> None:
    assert run_ranks(2, on_a_rank) == [([], []), ([], [])]


@pytest.mark.slow
def test_networks_of_the_field_have_one_graph() -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    from hpdist.models.hf.text import ImageClassifier, TextClassifier

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8))
    bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))
    images = torch.randn(2, 3, 32, 32)
    assert breaks(global_batch_norm(WideResNet(3, 10, 28, 2)), images) == []
    assert breaks(ImageClassifier(vit), images) == []
    assert breaks(TextClassifier(bert, 0), torch.randint(1, 50, (2, 7))) == []


def trained(backend: str, checkpointed: bool) -> dict[str, Any]:
    """Steps of two passes with batches of several sizes, eager and compiled; what differs."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, _ = small()
    if checkpointed:
        checkpoint_activations(model)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend=backend)
    torch.manual_seed(rank)
    graphs = []
    for rows in (4, 6, 5, 7, 8, 3):
        x = torch.randn(rows + rank, 3, 8, 8)
        for each in (model, compiled):
            each.zero_grad()
            with torch.no_grad():
                each(2 * x)
            each(x).square().sum().backward()
            running = RunningStatistics(batch_norms(each))
            running.discard() if rows == 5 else running.commit()
        graphs.append(counters["stats"]["unique_graphs"])
        for name, parameter in compiled.named_parameters():
            expected = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(compiled.state_dict(), model.state_dict())
    return {"graphs": graphs, "breaks": dict(counters["graph_break"])}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_trains_as_an_eager_one(
    backend: str, ranks: int, checkpointed: bool
) -> None:
    """The second size of a batch compiles graphs for any size, one for each kind of pass."""
    for found in run_ranks(ranks, trained, backend, checkpointed):
        assert found["breaks"] == {}
        assert found["graphs"] == [2, 4, 4, 4, 4, 4]
