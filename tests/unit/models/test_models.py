import sys

import pytest
import torch

from hpdist.config.component import IN_PYTHON, PythonComponent
from hpdist.data.structures import tensors_of
from hpdist.errors import ConfigError
from hpdist.models import build_model
from hpdist.models.cnn import CNNConfig
from hpdist.models.ladder import LadderConfig
from hpdist.models.mlp import MLPConfig
from hpdist.models.wide_resnet import WideResNetConfig
from hpdist.train.checks import check_model

CONFIGS = {
    "cnn": CNNConfig(width=4),
    "cnn-group": CNNConfig(width=6, norm="group"),
    "mlp": MLPConfig(hidden=[8, 8], dropout=0.5),
    "linear": MLPConfig(hidden=[]),
    "ladder": LadderConfig(hidden=[6]),
    "wrn": WideResNetConfig(depth=10, width=1, dropout=0.2),
    "wrn-group": WideResNetConfig(depth=10, width=1, norm="group"),
}
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 33, 47), (4, 64, 64), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_images_of_any_size_and_channels(name, shape):
    model = build_model(CONFIGS[name], shape, 7, seed=0)
    check_model(model, torch.rand(2, *shape), 7)
    said = model(torch.rand(2, *shape))
    torch.stack([tensor.sum() for tensor in tensors_of(said)]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vectors_need_an_mlp():
    check_model(build_model(MLPConfig(), (13,), 3, seed=0), torch.rand(4, 13), 3)
    for name in ("cnn", "wrn"):
        with pytest.raises(ConfigError, match=r"holds vectors of shape \[13\]; use mlp"):
            build_model(CONFIGS[name], (13,), 3, seed=0)


def test_wrn_28_2_has_as_many_parameters_as_in_the_literature():
    model = build_model(WideResNetConfig(), (3, 32, 32), 10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 1_467_610
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) + 1 + 2 == 28
    assert {"blocks.0.shortcut.weight", "blocks.4.shortcut.weight"} <= dict(
        model.named_parameters()
    ).keys()


def test_depth_makes_whole_blocks():
    models = [WideResNetConfig(depth=d, width=1).build((1, 8, 8), 2) for d in (10, 16, 28)]
    ten, sixteen, twenty_eight = (
        sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) for model in models
    )
    assert (sixteen - ten, twenty_eight - sixteen) == (6, 12)
    for depth in (12, 27, 4, 0):
        with pytest.raises(ValueError, match="depth\n  must be"):
            WideResNetConfig(depth=depth)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_seed_decides_the_weights(name):
    states = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # what was drawn before does not matter
        model = build_model(CONFIGS[name], (1, 8, 8), 3, seed)
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["cnn-group", "wrn-group"])
def test_group_norm_looks_at_no_other_row(name):
    model = build_model(CONFIGS[name], (3, 16, 16), 5, seed=0)
    images = torch.rand(6, 3, 16, 16)
    torch.testing.assert_close(model(images)[:2], model(images[:2]))
    assert not list(model.buffers())


MODULE = """
import torch
from torch import nn

def linear(num_classes, features=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))

def with_logits(num_classes):
    class Output(nn.Module):
        def forward(self, x):
            class Result:
                logits = torch.zeros(len(x), num_classes)
            return Result()
    return Output()

def number(num_classes):
    return num_classes

def broken(num_classes):
    raise KeyError("weights")

class Odd(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
    def forward(self, x):
        raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_models", None)


def own(name, **args):
    config = PythonComponent(name=f"python:own_models:{name}", args=args)
    return build_model(config, (1, 8, 8), 3, seed=0)


@pytest.mark.usefixtures("own_models")
def test_a_model_of_ones_own():
    images = torch.rand(2, 1, 8, 8)
    check_model(own("linear"), images, 3)
    check_model(own("with_logits"), images, 3)
    assert own("linear", features=9)[1].in_features == 9
    assert torch.equal(own("linear")[1].weight, own("linear")[1].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "model.name: python:own_models:number returned int, not a torch.nn.Module"),
        ("broken", "num_classes=3 and model.args, failed: KeyError: 'weights' ("),
        ("liner", "module 'own_models' has no 'liner', did you mean 'linear'?"),
        ("MODULE.x", "module 'own_models' has no 'MODULE.x'"),
    ],
)
@pytest.mark.usefixtures("own_models")
def test_a_function_that_makes_no_model(name, message):
    with pytest.raises(ConfigError) as caught:
        own(name)
    assert message in str(caught.value)


@pytest.mark.usefixtures("own_models")
def test_wrong_arguments_and_wrong_outputs():
    with pytest.raises(ConfigError, match="unexpected keyword argument 'widht'"):
        own("linear", widht=3)
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"to \[2, 3\], expected logits \[2, 4\]: \[rows, class"):
        check_model(own("linear"), images, 4)
    with pytest.raises(ConfigError, match=r"it fails on inputs of shape \[2, 1, 8, 8\]: Runtime"):
        check_model(own("linear", features=9), images, 3)
    with pytest.raises(ConfigError, match=r"RuntimeError: two lines \(.*own_models.py, line 26\)$"):
        check_model(own("Odd"), images, 3)


def test_a_model_that_was_an_object_cannot_be_named():
    with pytest.raises(ConfigError, match="was an object in Python; give it again there"):
        build_model(PythonComponent(name=IN_PYTHON), (1, 8, 8), 3, seed=0)


def test_check_model_leaves_the_model_in_training():
    model = build_model(CNNConfig(width=4), (1, 8, 8), 3, seed=0)
    before = [b.clone() for b in model.buffers()]
    check_model(model, torch.rand(2, 1, 8, 8), 3)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
