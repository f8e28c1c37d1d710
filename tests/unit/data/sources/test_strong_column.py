"""A column of its own as the strong view of text, from every kind of source."""

import datasets
import pytest
import torch

from hpdist.algorithms import FixMatch
from hpdist.algorithms.pi_model import PiModel
from hpdist.data.config import Labeled, Unlabeled
from hpdist.data.decode.text import PairSpec, TextSpec, Tokenizer
from hpdist.data.kinds import TEXT
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.data.views import TextViewsConfig
from hpdist.errors import ConfigError
from hpdist.train import config as configuration
from hpdist.train.checks import check_inputs
from tests.support.labeled import open_labeled
from tests.support.texts import SENTENCES, write_model

BACK = [" ".join(reversed(text.split())) for text in SENTENCES]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(str(write_model(tmp_path_factory.mktemp("model"))), 16)


@pytest.fixture(scope="module")
def labeled():
    table = datasets.Dataset.from_dict({"text": SENTENCES, "label": [0, 1] * 3})
    return open_labeled(Labeled(path="m"), 0, dataset=table, kind=TEXT)


def read(rows, spec, count):
    stream = BatchStream(rows, count, 0, 1, 0, spec)
    try:
        return next(stream)
    finally:
        stream.close()


def write(folder, kind, **columns):
    rows = datasets.Dataset.from_dict(columns)
    file = folder / f"rows.{kind}"
    rows.to_parquet(str(file)) if kind == "parquet" else rows.to_json(str(file))
    return {"path": kind, "data_files": str(file), "input": "text"}


def longer(row):
    return {**row, "text": row["text"] + " A star.", "back": row["back"] + " A team."}


def no_stars(row):
    return "star" not in row["text"]


@pytest.mark.parametrize(
    ("kind", "streaming"), [("parquet", True), ("parquet", False), ("json", True)]
)
def test_a_row_holds_both_texts_and_a_null_in_either_makes_it_a_bad_one(
    tmp_path, tokenizer, labeled, kind, streaming
):
    spec = PairSpec(tokenizer, "back")
    columns = {
        "other": range(8),
        "back": [*BACK, None, "A star."],
        "text": [*SENTENCES, "A star.", None],
    }
    source = write(tmp_path, kind, **columns) | {"streaming": streaming}
    rows = open_unlabeled(Unlabeled(**source), labeled, spec)
    batch = read(rows, spec, 8)
    assert tuple(batch.inputs.shape) == (8, 2, 16)
    assert {row.id: row.reason for row in batch.bad} == {
        6: "the value is null, in column 'back'",
        7: "the value is null",
    }
    plain = TextSpec(tokenizer)
    for row, pair, valid in zip(batch.ids.tolist(), batch.inputs, batch.valid, strict=True):
        assert bool(valid) == (row < 6)
        if valid:
            assert torch.equal(pair[0], plain.decode(SENTENCES[row]))
            assert torch.equal(pair[1], plain.decode(BACK[row]))
        else:
            assert not pair.any()


def test_filter_and_map_see_both(tmp_path, tokenizer, labeled):
    spec = PairSpec(tokenizer, "back")
    name = "python:tests.unit.data.sources.test_strong_column:"
    source = write(tmp_path, "parquet", text=SENTENCES, back=BACK)
    functions = {"filter": f"{name}no_stars", "map": f"{name}longer"}
    rows = open_unlabeled(Unlabeled(**source, **functions), labeled, spec)
    batch = read(rows, spec, 6)
    plain = TextSpec(tokenizer)
    assert batch.ids[~batch.valid].tolist() == [5]
    assert not batch.bad
    for row, pair in zip(batch.ids.tolist(), batch.inputs, strict=True):
        if row != 5:
            assert torch.equal(pair[0], plain.decode(SENTENCES[row] + " A star."))
            assert torch.equal(pair[1], plain.decode(BACK[row] + " A team."))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_column_that_is_not_there_or_no_text_is_refused(tmp_path, tokenizer, labeled, streaming):
    source = write(tmp_path, "parquet", text=SENTENCES, back=BACK, number=range(6))
    config = Unlabeled(**source, streaming=streaming)
    with pytest.raises(
        ConfigError,
        match=r"views\.strong_column: in data\.unlabeled there is no column 'bakc'; "
        r"there are text, back, number \(of text: text, back\)",
    ):
        open_unlabeled(config, labeled, PairSpec(tokenizer, "bakc"))
    with pytest.raises(ConfigError, match=r"'number' holds .*, not text; of text: text, back"):
        open_unlabeled(config, labeled, PairSpec(tokenizer, "number"))


def test_the_strong_view_is_the_column_and_noise_comes_on_top_only_by_config(tokenizer):
    plain = TextSpec(tokenizer)
    one, two = plain.decode(SENTENCES[0]), plain.decode(BACK[0])
    x = torch.stack([one, two])[None].repeat(64, 1, 1)
    place = {"stream": "unlabeled", "step": 0, "positions": torch.arange(64)}
    own = TextViewsConfig(strong_column="back", weak={"drop": 0})
    views = own.build(0, tokenizer.vocabulary)
    assert torch.equal(views.weak(x, **place), x[:, 0])
    assert torch.equal(views.plain(x), x[:, 0])
    assert torch.equal(views.strong(x, **place), x[:, 1])
    # What is labelled has no such column: its strong view is noise on the input.
    noisy = views.strong(x[:, 0], **place)
    usual = TextViewsConfig().build(0, tokenizer.vocabulary)
    assert torch.equal(noisy, usual.strong(x[:, 0], **place))
    again = configuration.ComponentOf("views").choose(own.model_dump()).build(0, views.vocabulary)
    assert torch.equal(again.strong(x, **place), x[:, 1])
    masking = TextViewsConfig(strong_column="back", strong={"mask": 0.5, "drop": 0, "swap": 0})
    found = masking.build(0, tokenizer.vocabulary).strong(x, **place)
    assert (found == tokenizer.vocabulary.mask).any()
    assert not torch.equal(found, x[:, 1])


def test_an_algorithm_without_a_strong_view_is_refused(tokenizer):
    spec = PairSpec(tokenizer, "back")
    check_inputs(FixMatch(), spec)
    with pytest.raises(ConfigError, match=r"views\.strong_column: PiModel makes no strong view"):
        check_inputs(PiModel(1.0, 1.0), spec)
