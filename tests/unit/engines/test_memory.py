"""Activation checkpointing: the same gradients and statistics from fewer kept tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpdist.distributed.batch_norm import batch_norms, global_batch_norm
from hpdist.errors import ConfigError
from hpdist.models import CNN
from hpdist.models.activation_checkpointing import checkpoint_activations


class Blocks(nn.Module):
    """Blocks with children, in a ModuleList, which calls none of them itself."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        for block in self.blocks:
            inputs = block(inputs)
        return self.classifier(inputs)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "cnn":
        return global_batch_norm(CNN(1, 8, 10))
    if kind == "blocks":
        return global_batch_norm(Blocks())
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        num_channels=1,
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        num_labels=10,
    )
    return global_batch_norm(MobileViTForImageClassification(config))


def run(model: nn.Module, side: int, virtual_batches: tuple[int, ...] | None) -> dict[str, Any]:
    """A step of the model; what it did, and how many bytes were kept for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    norms = list(batch_norms(model))
    for norm in norms:
        norm.virtual_batches = virtual_batches
    inputs = torch.rand(12, 1, side, side, generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(inputs)
        logits = getattr(output, "logits", output)
        loss = nn.functional.cross_entropy(logits, torch.arange(12) % 10)
    size = sum(kept.values())
    for norm in norms:  # as the step does, before its backward
        norm.virtual_batches = None
    loss.backward()
    assert all(norm.virtual_batches is None for norm in norms)
    passes = [len(norm.records.batches) for norm in norms]
    for norm in norms:
        norm.commit()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"gradients": gradients, "buffers": dict(model.named_buffers())} | {
        "bytes": size,
        "passes": passes,
    }


@pytest.mark.parametrize("virtual_batches", [None, (8, 4)])
@pytest.mark.parametrize(
    ("kind", "side", "share"), [("cnn", 8, 0.3), ("blocks", 8, 0.6), ("hugging face", 32, 0.8)]
)
def test_the_same_step_from_fewer_bytes(
    kind: str, side: int, share: float, virtual_batches: tuple[int, ...] | None
) -> None:
    plain, checkpointed = make(kind), make(kind)
    names = list(checkpointed.state_dict())
    checkpoint_activations(checkpointed)
    assert list(checkpointed.state_dict()) == names
    expected, found = run(plain, side, virtual_batches), run(checkpointed, side, virtual_batches)
    torch.testing.assert_close(found["gradients"], expected["gradients"])
    torch.testing.assert_close(found["buffers"], expected["buffers"])
    assert found["passes"] == expected["passes"]
    assert found["bytes"] < share * expected["bytes"]


def test_without_blocks_there_is_nothing_to_checkpoint() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing: Linear has no"):
        checkpoint_activations(nn.Linear(2, 2))


def test_a_hugging_face_model_that_cannot() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1])
    with pytest.raises(ConfigError, match="ResNetForImageClassification does not support it"):
        checkpoint_activations(ResNetForImageClassification(config))
