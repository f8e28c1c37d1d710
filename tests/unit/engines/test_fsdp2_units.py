"""Which parts of a model FSDP2 gathers one by one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hpdist.engines.fsdp2_units import find_units
from hpdist.errors import ConfigError
from hpdist.models import CNN, MLP, WideResNet


def names_of(model: nn.Module, units: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units]


def bert() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 50}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config)


def test_a_transformer_is_gathered_layer_by_layer() -> None:
    model = bert()
    layers = [f"bert.encoder.layer.{number}" for number in (1, 0)]
    assert names_of(model, find_units(model, min_parameters=0)) == [*layers, "bert.embeddings"]
    assert names_of(model, find_units(model, ["BertLayer"])) == layers
    assert find_units(model) == []  # all of it is small


def test_a_residual_network_is_gathered_block_by_block() -> None:
    model = WideResNet(3, 10, 16, 1)
    found = names_of(model, find_units(model, min_parameters=0))
    assert found == [f"blocks.{number}" for number in range(5, -1, -1)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    found = names_of(model, find_units(model, min_parameters=sizes[2]))
    assert found == [f"blocks.{n}" for n in range(5, -1, -1) if sizes[n] >= sizes[2]]


@pytest.mark.parametrize(
    ("model", "expected"),
    [(CNN(1, 8, 10), ["classifier", "features"]), (MLP(4, [8], 3), None)],
)
def test_without_blocks_it_is_the_children(model: nn.Module, expected: list[str] | None) -> None:
    children = [name for name, _ in model.named_children()]
    assert names_of(model, find_units(model, min_parameters=0)) == (expected or children[::-1])


def test_blocks_within_stages() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))

    stages = nn.ModuleList([nn.Sequential(block(), block()), nn.Sequential(block())])
    model = nn.ModuleDict({"stages": stages, "head": nn.Linear(2, 2)})
    found = names_of(model, find_units(model, min_parameters=0))
    assert found == ["stages.1.0.0", "stages.0.1.0", "stages.0.0.0"]


def test_a_normalisation_with_its_activation_is_no_block() -> None:
    class Normalised(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(2)
            self.act = nn.ReLU()

    def block() -> nn.Module:
        inner = nn.Sequential(nn.Conv2d(2, 2, 1), Normalised())
        return nn.ModuleDict({"inner": inner, "last": nn.Conv2d(2, 2, 1)})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = block()

    model = nn.Sequential(nn.Sequential(Block(), Block()))
    assert names_of(model, find_units(model, min_parameters=0)) == ["0.1", "0.0"]


def test_what_shares_a_weight_with_the_rest_is_no_unit() -> None:
    model = bert()
    model.classifier = nn.Linear(8, 50)
    model.classifier.weight = model.bert.embeddings.word_embeddings.weight
    found = names_of(model, find_units(model, min_parameters=0))
    assert found == [f"bert.encoder.layer.{number}" for number in (1, 0)]
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    block[1].weight = block[0].weight  # within a block it may
    whole = nn.Sequential(block, nn.Sequential(nn.Linear(3, 3)))
    assert len(find_units(whole, min_parameters=0)) == 2


def test_a_class_that_the_model_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"shard.units: BertFor.* no part .* LlamaLayer; it has"):
        find_units(bert(), ["BertLayer", "LlamaLayer"])
    assert find_units(bert(), []) == []
