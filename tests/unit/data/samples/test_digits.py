"""The bundled digits, written and read back."""

import sys

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.samples.digits import write_digits
from hpdist.data.sources.labeled import open_test
from hpdist.errors import DataError
from tests.support.labeled import open_labeled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "new")


def test_files_and_splits(folder):
    names = [f"train-{k:05d}-of-00004.parquet" for k in range(4)] + ["test-00000-of-00001.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_rows_are_scikit_learns_with_a_stratified_test(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    train = open_labeled(Labeled(path=str(folder)), 0)
    spec = input_spec(train)
    test = open_test(LabelColumn(path=str(folder), split="test"), train, spec)
    assert (len(train), len(test), spec.shape, spec.mode) == (1437, 360, (1, 8, 8), "L")
    assert train.classes.names == tuple("0123456789")
    assert np.bincount(test.labels).min() >= 34
    pixels = [
        (int(label), *spec.decode(value).flatten().tolist())
        for rows in (train, test)
        for label, value in zip(rows.labels, rows.read(np.arange(len(rows))), strict=True)
    ]
    digits = load_digits()
    scaled = np.rint(digits.data * 255 / 16).astype(int)
    expected = [(int(y), *x.tolist()) for y, x in zip(digits.target, scaled, strict=True)]
    assert sorted(pixels) == sorted(expected)


def test_writing_again_changes_nothing_and_mends_what_is_missing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_digits(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    (folder / "train-00002-of-00004.parquet").unlink()
    write_digits(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"hpdist\[demo\]"):
        write_digits(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/digits"):
        write_digits(tmp_path / "file" / "digits")
