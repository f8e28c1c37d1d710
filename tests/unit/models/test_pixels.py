"""Views normalise as a model was trained: against transformers' own image processors."""

import json
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hpdist.errors import ConfigError
from hpdist.models.pixels import with_model_pixels
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.1],
    "size": {"height": 8, "width": 8},
}


def write(folder, processor=None, name="preprocessor_config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VIT))
    if processor is not None:
        (folder / name).write_text(json.dumps(processor))
    return folder


def resolved(folder, views=None, model=None):
    values = {
        "model": {"name": f"hf:{folder}", "pretrained": False, **(model or {})},
        "views": {"name": "image", **(views or {})},
        "data": {"labeled": {"path": "m"}, "unlabeled": {"path": "m"}},
        "algorithm": {"name": "fixmatch"},
        "steps": 1,
    }
    config = configuration.parse(values)
    found, said = with_model_pixels(config.views, config.model)
    return config.model_copy(update={"views": found}), said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": True, "rescale_factor": 1 / 127.5},
        {"image_mean": 0.3, "image_std": 0.2},
    ],
)
def test_pixels_are_what_the_image_processor_makes_of_them(tmp_path, changes):
    from transformers import AutoImageProcessor

    folder = write(tmp_path / "vit", PROCESSOR | changes)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        Image.fromarray(pixels), return_tensors="pt"
    )["pixel_values"]
    config, said = resolved(folder)
    assert f"taken from preprocessor_config.json of {folder}" in said
    assert config.views.size == 8
    ours = config.views.build(0).plain(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_offset_and_the_size_of_what_is_cut_out(tmp_path):
    processor = {
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "image_mean": [0.0],
        "image_std": [1.0],
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    views = resolved(write(tmp_path, processor))[0].views
    assert views.size == 224
    assert views.mean == pytest.approx([0.5])  # x * 2 - 1
    assert views.std == pytest.approx([0.5])
    kept = resolved(write(tmp_path, processor | {"do_center_crop": False, "do_resize": False}))
    assert kept[0].views.size is None


def test_what_the_config_sets_wins(tmp_path):
    folder = write(tmp_path, PROCESSOR)
    config, said = resolved(folder, {"mean": [0.1]})
    assert config.views.mean == [0.1]
    assert config.views.std == PROCESSOR["image_std"]
    assert "views.mean" not in said
    own = {"mean": [0.1], "std": [0.2], "size": 16}
    config, said = resolved(folder, own)
    assert said is None
    assert config.views.model_dump() | own == config.views.model_dump()
    assert resolved(folder, model={"config": {"image_size": 12}})[0].views.size == 12


def test_a_processor_among_others_is_found(tmp_path):
    nested = {"image_processor": PROCESSOR, "processor_class": "SomeProcessor"}
    folder = write(tmp_path, nested, "processor_config.json")
    assert resolved(folder)[0].views.mean == PROCESSOR["image_mean"]
    write(folder, {"processor_class": "SomeProcessor"}, "processor_config.json")
    write(folder, PROCESSOR | {"image_mean": [0.7] * 3})
    assert resolved(folder)[0].views.mean == [0.7] * 3


def test_without_a_processor_everything_is_as_before_and_said(tmp_path):
    config, said = resolved(write(tmp_path))
    assert config.views.build(0).plain(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0] == 2
    assert "holds no preprocessor_config.json" in said
    assert "views.mean, views.std, views.size keep their defaults" in said


@pytest.mark.parametrize(
    "changes", [{"size": {"height": 8, "width": 6}}, {"image_std": [0.2, 0.0, 0.1]}]
)
def test_a_processor_that_cannot_be_followed_is_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"model\.name: .*; set views\.mean, views\.std and"):
        resolved(write(tmp_path, PROCESSOR | changes))


def picture(seed):
    file = BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def test_a_run_says_it_once_and_writes_it_down(tmp_path, capsys):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict(
        {"image": [picture(n) for n in range(8)], "label": [0, 1] * 4}, features
    )
    folder = write(tmp_path / "vit", PROCESSOR)
    Trainer(
        {"name": f"hf:{folder}", "pretrained": False},
        labeled=rows,
        unlabeled=rows,
        batch={"labeled": 4, "unlabeled": 4},
        run={"dir": str(tmp_path), "name": "run"},
        tracker={"name": "none"},
        steps=1,
    ).fit()
    assert capsys.readouterr().err.count("taken from preprocessor_config.json") == 1
    views = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["views"]
    assert views["mean"] == PROCESSOR["image_mean"]
    assert views["size"] == 8
