"""A folder of sound files is read as one of pictures is, without torchcodec."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.decode.audio import AudioSpec, Sampling
from hpdist.data.kinds import AUDIO
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from tests.support.labeled import open_labeled

soundfile = pytest.importorskip("soundfile")
RATE = 8000


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def sounds(root, classes=("high", "low"), rows=2, ending="wav"):
    for number, name in enumerate(classes):
        Path(root, name).mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            wave = np.full(800, 0.1 * (number + 1) + 0.01 * row, np.float32)
            soundfile.write(Path(root, name, f"{row}.{ending}"), wave, RATE)
    return root


def open_sounds(path, **settings):
    return open_labeled(Labeled(path=str(path), **settings), 0, kind=AUDIO)


def levels(values):
    spec = AudioSpec(Sampling(RATE, 800), (800,))
    return [round(float(spec.decode(value)[0]), 2) for value in values]


@pytest.mark.parametrize("ending", ["wav", "flac", "WAV"])
def test_a_folder_for_every_class(tmp_path, ending):
    folder = sounds(tmp_path / "[D] sounds", ending=ending)
    rows = open_sounds(folder)
    assert rows.classes.names == ("high", "low")
    assert rows.labels.tolist() == [0, 0, 1, 1]
    assert levels(rows.read(np.arange(4))) == [0.1, 0.11, 0.2, 0.21]
    assert len(open_sounds("audiofolder", data_files=f"{folder}/*/0.*")) == 2
    spec = AudioSpec(Sampling(RATE, 800), (800,))
    one = sounds(tmp_path / "one", ("low",), 1)
    assert open_test(LabelColumn(path=str(one)), rows, spec).labels.tolist() == [1]
    for streaming in (False, True):
        config = Unlabeled(path=str(folder), streaming=streaming)
        unlabeled = open_unlabeled(config, rows, spec)
        reader = unlabeled.reader(0, 4)
        read = unlabeled.values(reader.read(0, 4, 0, 4)).values
        reader.close()
        assert sorted(levels(read)) == [0.1, 0.11, 0.2, 0.21]
    written = convert(Unlabeled(path=str(folder)), tmp_path / "out")
    again = open_sounds("parquet", data_files=str(written.files[0]))
    assert levels(again.read(np.arange(4))) == [0.1, 0.11, 0.2, 0.21]


def test_metadata_beside_flat_sounds(tmp_path):
    flat = sounds(tmp_path / "flat", ("",), 2)
    rows = pd.DataFrame({"file_name": ["1.wav", "0.wav"], "label": ["b", "a"]})
    rows.to_csv(flat / "metadata.csv", index=False)
    found = open_sounds(flat)
    names = [found.classes.names[label] for label in found.labels]
    levels_of = dict(zip(names, levels(found.read(np.arange(2))), strict=True))
    assert levels_of == {"a": 0.1, "b": 0.11}
