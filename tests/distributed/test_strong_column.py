"""A strong view that is a column of Parquet files: the same curve on one rank and on two."""

import datasets
import pytest
import yaml

from hpdist.errors import ConfigError
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.distributed.test_text import close, curve
from tests.support.ranks import run_ranks
from tests.support.texts import SENTENCES, news_config, write_model

ROWS = 40


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, labelled rows, and unlabelled ones of which row 7 lacks its strong view."""
    folder = tmp_path_factory.mktemp("strong")
    texts = [SENTENCES[row % 6] + " " + SENTENCES[(row * 5 + 1) % 6] for row in range(ROWS)]
    back = [
        " ".join(reversed(text.split())) if row != 7 else None for row, text in enumerate(texts)
    ]
    labels = [row % 2 for row in range(ROWS)]
    datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(
        str(folder / "labeled.parquet")
    )
    datasets.Dataset.from_dict({"id": labels, "back": back, "text": texts}).to_parquet(
        str(folder / "unlabeled.parquet"), batch_size=8
    )
    return write_model(folder / "bert"), folder


def config(folder, places, views=None, streaming=True):
    model, data = places
    rows = {"path": "parquet", "input": "text"}
    sets = {
        "labeled": {**rows, "data_files": str(data / "labeled.parquet")},
        "unlabeled": {
            **rows,
            "data_files": str(data / "unlabeled.parquet"),
            "streaming": streaming,
        },
    }
    views = {"name": "text", "max_length": 32, "strong_column": "back"} | (views or {})
    algorithm = {"name": "fixmatch", "threshold": 0.5}
    return news_config(folder, model, data=sets, views=views, algorithm=algorithm, steps=5)


def train(values):
    trainer = Trainer.from_config(configuration.parse(values))
    return trainer.fit()["bad_rows"]


def test_the_same_curve_on_one_and_two_ranks_and_the_null_is_one_bad_row(tmp_path, places):
    assert train(config(tmp_path / "one", places)) == 2  # 80 rows are two epochs
    assert run_ranks(2, train, config(tmp_path / "two", places)) == [2, 2]
    one = curve(tmp_path / "one")
    assert close(one, curve(tmp_path / "two"))
    assert any(mask > 0 for _, _, mask, _ in one)
    settings = yaml.safe_load((tmp_path / "one" / "news" / "config.yaml").read_text())["views"]
    assert settings["strong"] is None  # so that the run's own config says the same again


def test_a_missing_column_is_refused_before_anything_is_trained(tmp_path, places):
    values = config(tmp_path, places, {"strong_column": "german"}, streaming=False)
    with pytest.raises(ConfigError, match=r"no column 'german'; there are id, back, text"):
        Trainer.from_config(configuration.parse(values))
