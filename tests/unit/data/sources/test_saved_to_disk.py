"""Folders of `save_to_disk`, named in a config."""

import datasets
import numpy as np
import pytest

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import UnlabeledTable, open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import MixedRows
from hpdist.distributed.rendezvous import Endpoint, Rendezvous
from hpdist.errors import ConfigError, DataError
from hpdist.preflight.datasets import check_data
from hpdist.train.config import parse
from tests.support.labeled import open_labeled

ALONE = Rendezvous(Endpoint(0, 1), None, None)


def table(rows, split=None):
    columns = {
        "a": [float(r) for r in rows],
        "b": [0.0 for _ in rows],
        "label": [r % 2 for r in rows],
    }
    return datasets.Dataset.from_dict(columns, split=split)


def labeled(path, **settings):
    return open_labeled(Labeled(path=str(path), input=["a", "b"], **settings), 0)


def first_column(rows):
    return [value[0] for value in rows.read(np.arange(len(rows)))]


def test_a_table(tmp_path):
    folder = tmp_path / "[1] saved"
    table(range(10)).save_to_disk(folder, num_shards=3)
    rows = labeled(folder)
    assert first_column(rows) == list(range(10))
    assert rows.labels.tolist() == [0, 1] * 5
    assert first_column(labeled(folder, split="train[2:4]")) == [2, 3]
    assert first_column(labeled(folder, split="all")) == list(range(10))
    test = open_test(LabelColumn(path=str(folder), split="train[:50%]"), rows, input_spec(rows))
    assert first_column(test) == list(range(5))
    with pytest.raises(DataError, match=r"data.labeled.split: .*of the split 'train', and none of"):
        labeled(folder, split="dev")


def test_a_table_of_another_split_and_format(tmp_path):
    part = table(range(6), split=datasets.Split.TEST).with_format("torch", columns=["a"])
    part.select([4, 2, 0]).save_to_disk(tmp_path / "saved")
    for split in ("train", "test", "all", "test[:3]"):
        assert first_column(labeled(tmp_path / "saved", split=split)) == [4, 2, 0]


def test_a_dict_of_tables(tmp_path):
    splits = {"train": table(range(4)), "extra": table(range(4, 6)), "test": table(range(6, 8))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert first_column(labeled(tmp_path / "saved")) == [0, 1, 2, 3]
    assert first_column(labeled(tmp_path / "saved", split="extra+test[:1]")) == [4, 5, 6]
    assert first_column(labeled(tmp_path / "saved", split="all")) == list(range(8))
    with pytest.raises(
        DataError, match=r'Unknown split "dev". Should be one of train, extra, test'
    ):
        labeled(tmp_path / "saved", split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_unlabelled_rows_have_all_promises(tmp_path, streaming):
    table(range(8)).save_to_disk(tmp_path / "saved")
    like = labeled(tmp_path / "saved")
    config = Unlabeled(path=str(tmp_path / "saved"), streaming=streaming)
    rows = open_unlabeled(config, like, input_spec(like))
    assert isinstance(rows, UnlabeledTable)
    assert first_column(rows) == list(range(8))
    mix = [{"path": str(tmp_path / "saved"), "streaming": streaming}] * 2
    mixed = open_unlabeled(Unlabeled(mix=mix), like, input_spec(like))
    assert isinstance(mixed, MixedRows)


def test_a_saved_set_is_converted(tmp_path):
    table(range(8)).save_to_disk(tmp_path / "saved")
    written = convert(Unlabeled(path=str(tmp_path / "saved"), input=["a"]), tmp_path / "out")
    assert written.rows == 8


@pytest.mark.parametrize(
    "setting", [{"data_files": "x.arrow"}, {"name": "default"}, {"options": {"sep": ";"}}]
)
def test_settings_of_files_are_refused(tmp_path, setting):
    table(range(2)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=rf"data.labeled.{next(iter(setting))}: .*save_to_disk"):
        labeled(tmp_path / "saved", **setting)


def test_a_saved_set_without_its_rows_is_named(tmp_path):
    table(range(2)).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"data.labeled \(.*saved.*cannot be loaded: .*arrow"):
        labeled(tmp_path / "saved")


def test_preflight_opens_every_set_that_is_mixed(tmp_path):
    table(range(4)).save_to_disk(tmp_path / "saved")
    table(range(4)).to_csv(tmp_path / "rows.csv")
    source = {"path": str(tmp_path / "saved"), "input": ["a", "b"]}
    config = parse(
        {
            "model": {"name": "mlp", "hidden": [4]},
            "data": {
                "labeled": source,
                "unlabeled": {"mix": [source, {"path": str(tmp_path / "gone")}]},
                "test": {"path": str(tmp_path / "rows.csv"), "input": ["a", "b"]},
            },
            "batch": {"labeled": 2, "unlabeled": 2},
            "algorithm": {"name": "fixmatch"},
            "views": {"name": "table"},
            "steps": 1,
        }
    )
    found = {
        finding.check: finding.verdict
        for finding in check_data(config.data, [{"host": "here"}], ALONE)
    }
    assert found == {
        "data.labeled": "ok",
        "data.unlabeled.mix.0": "ok",
        "data.unlabeled.mix.1": "FAILED",
        "data.test": "ok",
    }
