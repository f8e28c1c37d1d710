"""News through a small BERT: the same curve on any number of ranks, resumed, and in half precision.

Its dropout is off, since that draws from each rank's own seed.
"""

import json
import math

import pytest

from hpdist.errors import DataError
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.texts import NEWS, needs_news, news_config, write_model

pytestmark = needs_news

SHARDED = {
    "pretrained": False,
    "layer_decay": 0.5,
    "freeze": ["bert.embeddings.word*"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import pyarrow.parquet as pq

    first = next(iter(sorted(NEWS.glob("train-*.parquet"))))
    texts = pq.read_table(first, columns=["text"]).column("text").to_pylist()[:300]
    return write_model(tmp_path_factory.mktemp("bert"), sentences=texts)


def train(folder, model, changes):
    Trainer.from_config(configuration.parse(news_config(folder, model, **changes))).fit()


def curve(folder):
    """Loss, its unsupervised part, mask rate and gradient norm of each step."""
    rows = [json.loads(line) for line in (folder / "news" / "metrics.jsonl").open()]
    names = ("loss", "unsupervised_loss", "mask_rate", "grad_norm")
    return [[row.get(name, 0.0) for name in names] for row in rows]


def close(one, two, rel=1e-3):
    return [[pytest.approx(value, rel=rel, abs=rel) for value in step] for step in two] == one


def test_the_same_curve_on_one_rank_two_ranks_and_in_micro_batches(tmp_path, model):
    batch = {"labeled": 8, "unlabeled": 16, "micro": 12}
    runs = {"one": (1, {}), "two": (2, {}), "micro": (1, {"batch": batch})}
    for name, (ranks, changes) in runs.items():
        (tmp_path / name).mkdir()
        run_ranks(ranks, train, tmp_path / name, model, changes)
    one = curve(tmp_path / "one")
    assert any(0 < mask < 1 for _, _, mask, _ in one)
    assert close(one, curve(tmp_path / "two"))
    assert close(one, curve(tmp_path / "micro"))


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, model):
    train(tmp_path / "whole", model, {})
    train(tmp_path / "cut", model, {"steps": 3, "schedule": {"name": "constant"}})
    train(tmp_path / "cut", model, {"steps": 6, "schedule": {"name": "constant"}})
    train(tmp_path / "once", model, {"steps": 6, "schedule": {"name": "constant"}})
    assert close(curve(tmp_path / "cut"), curve(tmp_path / "once"), rel=1e-6)
    assert curve(tmp_path / "once") != curve(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parts_and_layer_decay_under_zero(tmp_path, model, stage):
    own = {"model": {"name": f"hf:{model}", **SHARDED}}
    (tmp_path / "plain").mkdir()
    run_ranks(1, train, tmp_path / "plain", model, own)
    run_ranks(2, train, tmp_path / "zero", model, own | {"zero": {"stage": stage}})
    assert close(curve(tmp_path / "plain"), curve(tmp_path / "zero"), rel=1e-3)


@pytest.mark.slow
def test_half_precision_under_zero_2(tmp_path, model):
    run_ranks(2, train, tmp_path / "plain", model, {})
    changes = {"zero": {"stage": 2}, "precision": "bf16"}
    run_ranks(2, train, tmp_path / "half", model, changes)
    plain, half = curve(tmp_path / "plain"), curve(tmp_path / "half")
    assert half[0][0] == pytest.approx(plain[0][0], rel=0.05)
    assert all(math.isfinite(loss) for loss, *_ in half)


@pytest.mark.slow
def test_a_teacher_of_its_own_under_zero_3_takes_token_ids(tmp_path, model):
    teacher = {"algorithm": {"name": "mean_teacher"}, "teacher": {"decay": 0.9}}
    run_ranks(1, train, tmp_path / "plain", model, teacher)
    run_ranks(2, train, tmp_path / "zero", model, teacher | {"zero": {"stage": 3}})
    assert close(curve(tmp_path / "plain"), curve(tmp_path / "zero"), rel=1e-3)


def test_too_many_rows_without_text_end_the_run(tmp_path, model):
    data = news_config(tmp_path, model)["data"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["Oil rose.", "", " "] * 20)
    )
    data["unlabeled"] = {
        "path": "json",
        "data_files": str(tmp_path / "rows.jsonl"),
        "max_bad_rows": 5,
    }
    with pytest.raises(DataError, match=r"its text is empty"):
        train(tmp_path, model, {"data": data})
