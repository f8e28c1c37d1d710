"""Local paths and files as people have them: odd names, links, hidden files, empty ones, typos."""

import logging
import os
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.files import paths
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.loading import load
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.errors import DataError
from tests.support.labeled import open_labeled


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def pictures(root, classes=("ant", "bee"), rows=2, ending=".png"):
    for number, name in enumerate(classes):
        folder = Path(root, name)
        folder.mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            pixels = np.full((4, 4, 3), 50 * number + row, np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}{ending}", "PNG")
    return root


def classes_of(path, **settings):
    rows = open_labeled(Labeled(path=str(path), **settings), 0)
    return rows.classes.names, rows.labels.tolist()


BOTH = (("ant", "bee"), [0, 0, 1, 1])


@pytest.mark.parametrize(
    "name",
    [
        "[D] set",
        "a*b?",
        "{x,y}",
        "with space",
        "quo'te\"",
        "naïve",
        "100%",
        "a#b",
        "=1",
        "[[",
        "!x",
    ],
)
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = pictures(tmp_path / name)
    assert classes_of(folder) == BOTH
    assert classes_of(f"{folder}/") == BOTH
    assert classes_of("imagefolder", data_files=f"{folder}/*/*.png") == BOTH
    assert classes_of("imagefolder", data_files=f"{folder}/**") == BOTH
    assert classes_of(folder, data_files="*/0.png") == (("ant", "bee"), [0, 1])


def test_rows_of_oddly_named_files_can_be_read(tmp_path):
    folder = pictures(tmp_path / "[D] set", ("a[1]", "b*?", "c:d"))
    rows = open_labeled(Labeled(path=str(folder)), 0)
    spec = input_spec(rows)
    pixels = [int(spec.decode(value).max()) for value in rows.read(np.arange(6))]
    assert pixels == [0, 1, 50, 51, 100, 101]
    assert rows.classes.names == ("a[1]", "b*?", "c:d")
    pictures(folder, ("e::f",))
    with pytest.raises(DataError, match=r"data.labeled: .*e::f/0.png cannot be read.*rename"):
        classes_of(folder)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_disk_decides_how_a_letter_is_composed(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    pictures(tmp_path / unicodedata.normalize(form, "éléphant"))
    folder = tmp_path / unicodedata.normalize(other, "éléphant")
    assert classes_of(folder) == BOTH
    asked = unicodedata.normalize(other, f"{tmp_path}/é*/*/*.png")
    assert classes_of("imagefolder", data_files=asked) == BOTH


def test_other_ways_to_write_a_path(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "my set")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    for path in ("~/my set", "../my set/", f"file://{folder}", f"file://{tmp_path}/my%20set"):
        assert classes_of(path) == BOTH
    for files in ("~/my set/*/*", "../my set/**", f"file://{folder}/*/*.png"):
        assert classes_of("imagefolder", data_files=files) == BOTH
    config = Labeled(path=folder, data_files=[Path("ant/0.png"), Path("bee/1.png")])
    assert open_labeled(config, 0).labels.tolist() == [0, 1]


def test_links_are_followed_and_loops_left(tmp_path, caplog):
    real = pictures(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "ant").symlink_to(real / "ant")
    (linked / "bee").mkdir()
    for row in range(2):
        (linked / "bee" / f"{row}.png").symlink_to(real / "bee" / f"{row}.png")
    (linked / "bee" / "up").symlink_to(linked)
    (linked / "loop").symlink_to(linked)
    (linked / "bee" / "gone.png").symlink_to(real / "nothing.png")
    with caplog.at_level(logging.WARNING, "hpdist.data"):
        assert classes_of(linked) == BOTH
    assert [r.getMessage() for r in caplog.records if "gone.png" in r.getMessage()]
    assert classes_of("imagefolder", data_files=f"{linked}/**/*.png") == BOTH
    (tmp_path / "again").symlink_to(linked)
    assert classes_of(tmp_path / "again") == BOTH


def test_what_is_no_data_is_left_out(tmp_path, caplog):
    folder = pictures(tmp_path / "set", ("ant",))
    pictures(folder, ("bee",), ending=".PNG")
    for junk in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt"):
        (folder / "ant" / junk).write_bytes(b"junk")
    (folder / "empty class").mkdir()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "2.png").write_bytes(b"junk")
    with caplog.at_level(logging.WARNING, "hpdist.data"):
        assert classes_of(folder) == BOTH
    assert (
        "data.labeled: no class is made of folders that hold no files: empty class" in caplog.text
    )


def test_one_class_is_a_class(tmp_path):
    assert classes_of(pictures(tmp_path / "one", ("ant",))) == (("ant",), [0, 0])
    like = open_labeled(Labeled(path=str(pictures(tmp_path / "both"))), 0)
    test = open_test(
        LabelColumn(path=str(pictures(tmp_path / "bees", ("bee",)))), like, input_spec(like)
    )
    assert test.labels.tolist() == [1, 1]


def test_splits_are_folders_or_files(tmp_path):
    pictures(tmp_path / "set" / "train")
    pictures(tmp_path / "set" / "test", ("bee",), 1)
    assert classes_of(tmp_path / "set") == BOTH
    assert classes_of(tmp_path / "set", split="test") == (("bee",), [0])
    assert len(classes_of(tmp_path / "set", split="all")[1]) == 5
    assert len(classes_of(tmp_path / "set", split="train[:50%]+test")[1]) == 3
    with pytest.raises(DataError, match=r'data.labeled.split: Unknown split "dev".*train, test'):
        classes_of(tmp_path / "set", split="dev")


def test_flat_splits_are_no_classes(tmp_path):
    for split in ("train", "test"):
        pictures(tmp_path / "flat", (split,))
    table = load(Unlabeled(path=str(tmp_path / "flat")), "data.unlabeled", streaming=False)
    assert table.column_names == ["image"]
    with pytest.raises(
        DataError, match=r"data.labeled: the folders in .* tell no classes.*no folder"
    ):
        classes_of(tmp_path / "flat")


def test_a_picture_outside_of_the_classes_is_named(tmp_path):
    folder = pictures(tmp_path / "set")
    pictures(folder, ("",), 1)
    with pytest.raises(DataError, match=r"since 0.png lies less deep in folders than \w+/\d.png"):
        classes_of(folder)
    table = load(Unlabeled(path=str(folder)), "data.unlabeled", streaming=False)
    assert len(table) == 5


def test_a_folder_in_no_split_is_told(tmp_path, caplog):
    pictures(tmp_path / "set", ("train", "tram"))  # a class that is named as a split is
    with caplog.at_level(logging.WARNING, "hpdist.data"):
        load(Unlabeled(path=str(tmp_path / "set")), "data.unlabeled", streaming=False)
    assert "tram" in caplog.text
    assert "in no split" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_beside_flat_pictures(tmp_path, ending):
    flat = pictures(tmp_path / "[D]", ("",), 3)
    rows = pd.DataFrame({"file_name": ["2.png", "0.png", "1.png"], "label": ["c", "a", "b"]})
    path = flat / f"metadata.{ending}"
    rows.to_csv(path, index=False) if ending == "csv" else rows.to_json(
        path, orient="records", lines=True
    )
    names, labels = classes_of(flat)
    assert (names, sorted(labels)) == (("a", "b", "c"), [0, 1, 2])


@pytest.mark.parametrize(
    ("written", "meant"),
    [("data/trian", "data/train"), ("dta/train", "data/train"), ("data/train/xs.csv", "x.csv")],
)
def test_a_typo_is_no_name_on_the_hub(tmp_path, monkeypatch, written, meant):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "x.csv").write_text("a,label\n1,2\n")
    with pytest.raises(DataError, match=rf"data.labeled.path: .*did you mean '.*{meant}'"):
        classes_of(written)
    with pytest.raises(DataError, match=r"data_files: nothing matches .*did you mean '.*x.csv'"):
        classes_of("csv", data_files="data/train/y.csv")


@pytest.mark.parametrize("name", ["facebook/voxpopuli", "buckets/me/mine/set", "mnist"])
def test_a_name_on_the_hub_is_asked_of_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook" / "wav2vec").mkdir(parents=True)
    asked = []

    class Builder:
        def download_and_prepare(self) -> None: ...

        def as_dataset(self, split: str) -> None: ...

    def load_builder(path: str, **_: object) -> Builder:
        asked.append(path)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    load(Unlabeled(path=name), "data.unlabeled", streaming=False)
    assert asked == [name]
    (tmp_path / "facebook" / "voxpopuli2").mkdir()
    with pytest.raises(DataError, match=r"did you mean .* hf://datasets/facebook/voxpopuli"):
        load(Unlabeled(path="facebook/voxpopuli"), "data.unlabeled", streaming=False)


def test_a_name_that_the_hub_has_not_may_be_a_typo_too(tmp_path, monkeypatch):
    def not_there(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", not_there)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"the Hub did not give it: .*; did you mean 'photos'\?"):
        classes_of("potos")


def test_a_pattern_is_no_path(tmp_path):
    with pytest.raises(DataError, match=r"data.labeled.path: .*a pattern goes into data_files"):
        classes_of(f"{tmp_path}/*.csv")


def test_a_single_file_is_a_path(tmp_path):
    (tmp_path / "rows.csv").write_text("a,label\n1,x\n2,y\n")
    assert classes_of(tmp_path / "rows.csv", input=["a"]) == (("x", "y"), [0, 1])


def test_a_link_that_leads_nowhere_says_so(tmp_path):
    (tmp_path / "set").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"'.*set' is a link that leads nowhere: to '.*gone'"):
        classes_of(tmp_path / "set")


def test_unlabeled_folders_are_read_alike(tmp_path):
    folder = pictures(tmp_path / "[D] set")
    like = open_labeled(Labeled(path=str(folder)), 0)
    spec = input_spec(like)
    for streaming in (False, True):
        config = Unlabeled(path=str(folder), streaming=streaming)
        rows = open_unlabeled(config, like, spec)
        with_reader = rows.reader(0, 4)
        try:
            read = rows.values(with_reader.read(0, 4, 0, 4)).values
        finally:
            with_reader.close()
        assert sorted(int(spec.decode(value).max()) for value in read) == [0, 1, 50, 51]


def test_neighbours_are_of_the_part_that_is_missing(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert paths.neighbour(str(tmp_path / "data" / "trian")) == str(tmp_path / "data" / "train")
    assert paths.neighbour(str(tmp_path / "dtaa" / "train")) == str(tmp_path / "data" / "train")
    assert paths.neighbour(str(tmp_path / "data" / "xyz")) is None
    (tmp_path / "data" / "train" / "0.parquet").touch()
    pattern = os.path.join("train", "*.parquet")
    meant = str(tmp_path / "data" / pattern)
    assert paths.neighbour(str(tmp_path / "dtaa" / pattern)) == meant
    assert paths.neighbour(str(tmp_path / "data" / "trian" / "*.parquet")) == meant
    assert paths.neighbour(str(tmp_path / "data" / "trian" / "*.csv")) is None
