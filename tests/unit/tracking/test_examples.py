"""Pictures of the views: what they show, and that a run is none the worse for them."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from hpdist.config.component import ComponentOf
from hpdist.data.batch import UnlabeledBatch
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.decode.text import PairSpec, Tokenizer
from hpdist.data.decode.vector import VectorSpec
from hpdist.tracking.examples import write_examples
from tests.support.picture_runs import records_of, train, write_config
from tests.support.pictures import write_pictures
from tests.support.texts import write_model


def batch_of(inputs: torch.Tensor, valid=None) -> UnlabeledBatch:
    ids = torch.arange(len(inputs))
    return UnlabeledBatch(inputs, ids, None if valid is None else torch.tensor(valid))


def views(**settings):
    return ComponentOf("views").choose(settings).build(0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_original_in_the_sheet_has_the_pixels_of_the_row(tmp_path, channels):
    """However the views scale what the model sees."""
    noise = np.random.default_rng(0)
    x = torch.from_numpy(noise.integers(0, 256, (5, channels, 16, 16), np.uint8))
    if channels == 4:
        x[:, 3] = 255
    image = views(name="image", mean=[0.3], std=[0.1])
    spec = ImageSpec((channels, 16, 16), "encoded", {1: "L", 3: "RGB", 4: "RGBA"}[channels])
    file = write_examples(tmp_path, image, spec, batch_of(x, [False, *[True] * 4]), 3, 0)
    assert file == tmp_path / "examples" / "views.png"
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    times = 7  # 16 pixels become 112
    shown = pixels[16 : 16 + 112 : times, 3 : 3 + 112 : times]
    wanted = x[1].permute(1, 2, 0).expand(-1, -1, max(channels, 3))[:, :, :3]
    if channels < 4:
        assert np.abs(shown.astype(int) - wanted.numpy().astype(int)).max() <= 1
    assert pixels.shape == (16 + 3 * 118, 3 * 118, 3)
    weak = pixels[16:128, 118 + 3 : 118 + 3 + 112]
    assert not np.array_equal(weak, pixels[16:128, 3 : 3 + 112])


def test_large_small_and_narrow_pictures_fit(tmp_path):
    for height, width in ((300, 500), (1, 1), (1, 700), (40, 3)):
        x = torch.full((2, 3, height, width), 7, dtype=torch.uint8)
        spec = ImageSpec((3, height, width), "encoded", "RGB")
        file = write_examples(tmp_path, views(name="image"), spec, batch_of(x), 8, 0)
        with Image.open(file) as sheet:
            assert max(sheet.size) < 400


def test_a_table_is_text_by_feature(tmp_path):
    table = views(name="identity")
    spec = VectorSpec((40,), names=tuple(f"feature {n}" for n in range(40)))
    x = torch.arange(80.0).view(2, 40)
    x[0, 1] = float("nan")
    file = write_examples(tmp_path, table, spec, batch_of(x), 8, 0)
    lines = file.read_text().splitlines()
    assert lines[0].split() == ["feature", "original", "weak", "strong"]
    assert lines[2].split() == ["feature", "1", "nan", "nan", "nan"]
    assert lines[-1] == "and 10 more features"


@pytest.mark.parametrize("column", [None, "translated"])
def test_text_is_put_into_words_again(tmp_path, column):
    write_model(
        tmp_path / "tokenizer", sentences=["the cat sat on the mat", "a dog ran in the park"]
    )
    tokenizer = Tokenizer(str(tmp_path / "tokenizer"), 12)
    spec = PairSpec(tokenizer, column)
    rows = tokenizer.encode(["the cat sat on the mat", "a dog ran in the park"])
    x = torch.from_numpy(rows if column is None else np.stack([rows, rows[::-1]], axis=1))
    text = ComponentOf("views").choose(
        {"name": "text", "max_length": 12, "weak": {"drop": 0}, "strong": {"drop": 0.5}}
        | ({} if column is None else {"strong_column": column})
    )
    file = write_examples(tmp_path, text.build(0, tokenizer.vocabulary), spec, batch_of(x), 8, 0)
    lines = file.read_text().splitlines()
    assert lines[0] == "original  the cat sat on the mat"
    assert lines[4] == "original  a dog ran in the park"
    assert [line.split()[0] for line in lines if line] == ["original", "weak", "strong"] * 2


def test_no_usable_row_is_no_picture(tmp_path):
    x = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    spec = ImageSpec((1, 4, 4), "encoded", "L")
    none = batch_of(x, [False, False])
    assert write_examples(tmp_path, views(name="image"), spec, none, 8, 0) is None


class DrawingViews:
    """Views of somebody's own, which draw from every generator there is."""

    def plain(self, x):
        return x.float() + torch.rand(1) + random.random() + np.random.rand()

    def weak(self, x, **where):
        return self.plain(x)

    strong = weak


def test_generators_are_given_back_as_they_were(tmp_path):
    spec = VectorSpec((3,))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    write_examples(tmp_path, DrawingViews(), spec, batch_of(torch.ones(2, 3)), 8, 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_run_has_its_picture_once_in_folder_tracker_and_report(tmp_path):
    """And trains as one without; what keeps the picture from being written costs only that."""
    config = write_config(tmp_path, write_pictures(tmp_path))
    few = ["--steps=2", "--tracker.name=wandb"]
    assert train(config, "shown", *few) == (0, [])
    run = tmp_path / "runs" / "shown"
    with Image.open(run / "examples" / "views.png") as sheet:
        assert sheet.size[0] > 300
    (media,) = run.glob("wandb/offline-run-*/files/media/images/examples/*.png")
    with Image.open(media) as logged, Image.open(run / "examples" / "views.png") as sheet:
        assert np.array_equal(np.asarray(logged.convert("RGB")), np.asarray(sheet))
    assert json.loads((run / "classes.json").read_text()) == ["0", "1", "2", "3", "4"]
    (run / "examples" / "views.png").write_bytes(b"")  # a run that goes on leaves it as it is
    assert train(config, "shown", "--steps=3") == (0, [])
    assert (run / "examples" / "views.png").read_bytes() == b""

    assert train(config, "plain", "--steps=2", "--log.examples=0") == (0, [])
    assert not (tmp_path / "runs" / "plain" / "examples").exists()
    blocked = tmp_path / "runs" / "blocked"
    blocked.mkdir()
    (blocked / "examples").write_text("a file")
    assert train(config, "blocked", "--steps=2") == (0, [])
    losses = [records_of(tmp_path / "runs" / name, "loss")[:2] for name in ("shown", "plain")]
    assert losses[0] == losses[1] == records_of(blocked, "loss")
