"""Heads on features that a hook takes from a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hpdist
from hpdist.algorithms import Algorithm, FixMatch, LossTerms, StudentOutputs, Views
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.projections import Pool, flat_linear, linear, projection
from hpdist.data.views import ImageViewsConfig
from hpdist.errors import ConfigError
from hpdist.models import CNN, MLP, WideResNet
from hpdist.models.outputs import logits_of
from hpdist.models.with_heads import head_names_of, with_heads
from tests.support.recipes import global_batches, make_step


class TwoHeads(Algorithm):
    """Pulls the features of both views together, and classifies with a second head."""

    views = Views(weak=1, strong=2)
    head_names = ("projection", "second")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        self.seen.append(features)
        return {"projection": projection(features, 6), "second": linear(features, 10)}

    def loss(self, outputs: StudentOutputs, student_sums: Any) -> LossTerms:
        first, second = outputs.heads["projection"].strong
        assert outputs.weak is not None
        (weak,) = outputs.weak.heads["projection"]
        assert weak.shape == first.shape == (len(weak), 6)
        assert not weak.requires_grad
        distance = (first - second).square().sum() + (first - weak).square().sum()
        logits = outputs.heads["second"].labeled
        extra = nn.functional.cross_entropy(logits, outputs.labels, reduction="sum")
        return LossTerms(
            supervised_loss(outputs),
            distance / outputs.unlabeled_rows,
            extras={"second": extra / outputs.labeled_rows},
        )


class Named(nn.Module):
    """An output with `.logits`, features under a name, and a linear layer that is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 3, padding=1)
        self.gate = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 10)
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Any:
        maps = self.encoder(inputs)
        pooled = maps.mean(dim=(2, 3))
        return SimpleNamespace(logits=self.classifier(pooled * self.gate(pooled).sigmoid()))


IMAGES = torch.rand(3, 1, 8, 8)


@pytest.mark.parametrize(
    ("model", "features", "shape"),
    [
        (CNN(1, 8, 10), None, [32]),
        (CNN(1, 8, 10), "features", [32, 2, 2]),
        (MLP(64, [12, 7], 10), None, [7]),
        (WideResNet(1, 10, depth=10, width=1), None, [64]),
        (Named(), None, [4]),
        (Named(), "encoder", [4, 8, 8]),
    ],
)
def test_features_are_found(model: nn.Module, features: str | None, shape: list[int]) -> None:
    algorithm = TwoHeads()
    whole = with_heads(model, algorithm, IMAGES, features)
    assert list(algorithm.seen[0]) == shape
    assert head_names_of(whole) == ("projection", "second")
    whole.train()
    said = whole(IMAGES)
    shapes = {name: tuple(tensor.shape) for name, tensor in said.items()}
    assert shapes == {"logits": (3, 10), "projection": (3, 6), "second": (3, 10)}
    torch.testing.assert_close(said["projection"].norm(dim=1), torch.ones(3))
    sum(tensor.sum() for tensor in said.values()).backward()
    assert all(p.grad is not None for p in whole.heads.parameters())
    whole.eval()
    model.eval()
    torch.testing.assert_close(logits_of(whole(IMAGES)), logits_of(model(IMAGES)))


def test_a_head_can_predict() -> None:
    algorithm = TwoHeads()
    algorithm.predicts = "second"
    model = CNN(1, 8, 10)
    whole = with_heads(model, algorithm, IMAGES).eval()
    kept: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    said = whole(IMAGES)
    hook.remove()
    torch.testing.assert_close(said, whole.heads["second"](kept[0]))
    assert list(whole.train()(IMAGES)) == ["logits", "projection", "second"]


def test_an_algorithm_without_heads_leaves_the_model_alone() -> None:
    model = CNN(1, 8, 10)
    assert with_heads(model, FixMatch(), IMAGES) is model
    assert head_names_of(model) == ()


class _Maps(TwoHeads):
    """A head that gives a picture for a row, and one that gives nothing for it."""

    head_names = ("map",)
    made: nn.Module = nn.Unflatten(1, (2, 4, 4))

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        return {"map": self.made}


def test_a_head_may_give_any_shape_of_rows() -> None:
    algorithm = _Maps()
    assert with_heads(CNN(1, 8, 10), algorithm, IMAGES)(IMAGES)["map"].shape == (3, 2, 4, 4)
    algorithm.made = nn.Flatten(0)
    with pytest.raises(ConfigError, match=r"the head 'map' gives \[96\] for 3 rows; heads must"):
        with_heads(CNN(1, 8, 10), algorithm, IMAGES)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="no submodule 'feature', did you mean 'features'"):
        with_heads(CNN(1, 8, 10), TwoHeads(), IMAGES, "feature")
    with pytest.raises(ConfigError, match=r"no linear layer .*model\.features"):
        with_heads(nn.Flatten(), TwoHeads(), IMAGES)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Flatten(0)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.turn(inputs).view(len(inputs), -1)

    with pytest.raises(ConfigError, match=r"turn gives \[192\] for inputs"):
        with_heads(Transposed(), TwoHeads(), IMAGES, "turn")
    accelerator = Accelerator(cpu=True)
    model = CNN(1, 8, 10)
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="needs the heads projection, second, which the model"):
        hpdist.SemiSupervisedStep(accelerator, *prepared, TwoHeads(), ImageViewsConfig().build(0))


def test_heads_are_trained_with_the_model() -> None:
    step = make_step(TwoHeads(), lr=0.05)
    module = step.engine.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = [step(*global_batches(n % 2), measure=True).metrics["second"] for n in range(12)]
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())
    assert losses[-1] < losses[0]
    assert step.teacher is not None
    assert set(step.teacher.whole()) == {*dict(module.named_parameters())}


def test_pieces_of_heads() -> None:
    assert Pool()(torch.ones(2, 3)).shape == (2, 3)
    assert Pool()(torch.ones(2, 5, 3)).shape == (2, 3)  # tokens
    assert Pool()(torch.ones(2, 3, 4, 5)).shape == (2, 3)
    assert flat_linear(torch.Size([3, 4, 5]), 7)(torch.ones(2, 3, 4, 5)).shape == (2, 7)
    assert linear(torch.Size([5, 3]), 7)(torch.ones(2, 5, 3)).shape == (2, 7)
    vectors = projection(torch.Size([3]), 4, hidden=9)(torch.randn(6, 3).half().float())
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
