"""Models of timm by name. They need timm, which imports torchvision of the same build as torch."""

import datasets
import pytest
import torch
import yaml
from torch import nn

import hpdist
from hpdist import cli
from hpdist.data.kinds.modes import for_channels
from hpdist.distributed.batch_norm import GlobalBatchNormAct, batch_norms, global_batch_norm
from hpdist.errors import ConfigError
from hpdist.models import TimmConfig, build_model
from hpdist.models.pixels import with_model_pixels
from hpdist.models.with_heads import with_heads
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.support.model_runs import outputs_of, pictures, trained

try:
    import timm
except (ImportError, RuntimeError) as error:  # of torchvision beside the CPU build of torch
    timm, why = None, str(error)
needs_timm = pytest.mark.skipif(timm is None, reason=f"needs timm: {'' if timm else why}")


def build(name="test_resnet", shape=(3, 32, 32), classes=4, **options):
    config = TimmConfig(name=f"timm:{name}", **({"pretrained": False} | options))
    return build_model(config, shape, classes, 0)


def run_config(name, views=None, **options):
    return configuration.parse(
        {
            "model": {"name": f"timm:{name}", "pretrained": False, **options},
            "views": {"name": "image", **(views or {})},
            "data": {"labeled": {"path": "m"}, "unlabeled": {"path": "m"}},
            "algorithm": {"name": "fixmatch"},
            "steps": 1,
        }
    )


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs timm.*pip install 'hpdist\[timm\]'"):
        build()


def test_the_name_chooses_the_options():
    parsed = run_config("resnet18", options={"drop_path_rate": 0.1})
    assert isinstance(parsed.model, TimmConfig)
    assert parsed.model.path == "resnet18"
    assert configuration.parse(parsed.model_dump()).model == parsed.model
    with pytest.raises(ConfigError, match=r"model\.depth: unknown setting"):
        run_config("resnet18", depth=3)
    with pytest.raises(ConfigError, match=r"known: .*timm:name"):
        configuration.ComponentOf("model")._class("no-such-model")


@needs_timm
def test_classes_and_channels_are_those_of_the_data():
    model = build(shape=(1, 32, 32), classes=7)
    assert tuple(model(torch.rand(2, 1, 32, 32)).shape) == (2, 7)
    assert model.training
    twin, other = build(shape=(1, 32, 32), classes=7), build(shape=(3, 32, 32), classes=7)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert tuple(other(torch.rand(2, 3, 32, 32)).shape) == (2, 7)


@needs_timm
def test_views_take_what_the_weights_were_trained_with():
    def taken(config):
        return with_model_pixels(config.views, config.model)

    given = run_config("resnet10t")
    views, said = taken(given)
    assert views.mean == [0.485, 0.456, 0.406]
    assert views.std == [0.229, 0.224, 0.225]
    assert views.size is None  # a ResNet takes any
    assert "taken from timm's config of resnet10t" in said
    assert taken(run_config("test_vit"))[0].size == 160
    small = run_config("test_vit", options={"img_size": 32})
    assert taken(small)[0].size == 32
    assert for_channels(views, given.views, 3) == (views, None)
    grey, said = for_channels(views, given.views, 1)
    assert grey.mean == pytest.approx([0.449], abs=1e-3)
    assert "for one channel their mean: views.mean [0.449]" in said
    own = run_config("resnet10t", {"mean": [0.1], "std": [0.2], "size": 8})
    assert taken(own) == (own.views, None)


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_features_are_those_before_the_last_layer(name):
    options = {"img_size": 32} if name == "test_vit" else {}
    model = build(name, options=options)
    algorithm = configuration.ComponentOf("algorithm").choose({"name": "simmatch"}).build(4)
    example = torch.rand(2, 3, 32, 32)
    whole = with_heads(model, algorithm, example)
    said = whole(example)
    assert list(said) == ["logits", *algorithm.head_names]
    assert tuple(said["logits"].shape) == (2, 4)
    if name == "test_resnet":
        named = with_heads(build(name), algorithm, example, "global_pool")
        with named._features.kept(named.model) as kept:
            named.model(example)
        assert tuple(kept[-1].shape) == (2, model.num_features)
    with pytest.raises(ConfigError, match=r"model\.features: the model has no submodule 'pool'"):
        with_heads(build(name, options=options), algorithm, example, "pool")


@needs_timm
def test_a_batch_norm_with_an_activation_keeps_it():
    torch.manual_seed(0)
    theirs = build("test_efficientnet")
    ours = global_batch_norm(build("test_efficientnet"))
    x = torch.rand(8, 3, 32, 32)
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert any(isinstance(m, GlobalBatchNormAct) for m in ours.modules())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for norm in batch_norms(ours):
        norm.commit()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@needs_timm
def test_what_is_wrong_is_one_line():
    with pytest.raises(ConfigError, match=r"timm has no model 'test_resnit', did you mean 'test_r"):
        build("test_resnit")
    with pytest.raises(ConfigError, match=r"model\.options\.num_classes: it follows"):
        build(options={"num_classes": 3})
    with pytest.raises(ConfigError, match=r"timm:test_resnet cannot be made: .*no_such_option"):
        build(options={"no_such_option": 3})
    with pytest.raises(ConfigError, match="takes images"):
        build(shape=(13,))


@needs_timm
def test_a_grey_run(tmp_path, capsys):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 8, 8), generator=draw, dtype=torch.uint8).tolist()
    features = datasets.Features(
        image=datasets.Array2D((8, 8), "uint8"), label=datasets.Value("int64")
    )
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 8}, features)
    summary = Trainer(
        {"name": "timm:resnet10t", "pretrained": False},
        "simmatch",
        labeled=(rows, {"input": "image"}),
        unlabeled=(rows, {"input": "image"}),
        test=(rows, {"input": "image"}),
        batch={"labeled": 4, "unlabeled": 8},
        run={"dir": str(tmp_path), "name": "run"},
        tracker={"name": "none"},
        steps=2,
    ).fit()
    assert summary["steps"] == 2
    assert capsys.readouterr().err.count("taken from timm's config of resnet10t") == 1
    views = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["views"]
    assert len(views["mean"]) == 1
    assert isinstance(build("test_resnet"), nn.Module)


@needs_timm
def test_a_loaded_model_gives_the_outputs_of_the_training(tmp_path):
    """Also exported to ONNX in fp16, where the packages for that are there."""
    made = pictures(tmp_path)
    rows = made["rows"]
    trainer, _ = trained(
        tmp_path, "pictures", model={"name": "timm:test_efficientnet", "pretrained": False}
    )
    expected = outputs_of(trainer)
    run = tmp_path / "run"
    for place in (run, run / "model", run / "checkpoints" / "step-00000003"):
        loaded = hpdist.load(place)
        torch.testing.assert_close(loaded.raw_outputs(rows, batch=5), expected, rtol=0, atol=1e-6)
        assert not any(isinstance(m, GlobalBatchNormAct) for m in loaded.model.modules())
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    command = ["export", str(run), str(tmp_path / "rows.parquet"), "--precision", "fp16"]
    assert cli.main([*command, "--out", str(tmp_path / "half.onnx")]) == 0
    found = hpdist.load(tmp_path / "half.onnx").raw_outputs(rows)
    assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
