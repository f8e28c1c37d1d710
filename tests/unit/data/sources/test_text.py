"""Text becomes token ids: what is decoded, what is refused, and how a run reads it."""

import threading

import datasets
import numpy as np
import pytest
import torch

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.decode.text import TextSpec, Tokenizer
from hpdist.data.kinds import TEXT, input_spec
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.errors import ConfigError, DataError
from tests.support.labeled import open_labeled
from tests.support.texts import SENTENCES, write_model, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder):
    return TextSpec(Tokenizer(str(folder), 16))


def test_a_row_has_a_beginning_an_end_and_padding_and_is_cut_off_where_it_is_long(spec):
    vocabulary = spec.tokenizer.vocabulary
    short, long = spec.decode("The cat."), spec.decode(" ".join(SENTENCES))
    begin, end = short[0].item(), long[-1].item()
    assert short.dtype == torch.int64
    assert tuple(short.shape) == tuple(long.shape) == (16,)
    assert {vocabulary.pad, begin, end} == set(vocabulary.special)
    assert long[0] == begin
    assert vocabulary.pad not in long
    last = int((short != vocabulary.pad).sum())
    assert short[last - 1] == end
    assert (short[last:] == vocabulary.pad).all()


def test_what_is_no_text_is_named_and_leaves_zeros(spec):
    values = ["The cat.", None, "  \n", 3, np.zeros(3), Unreadable("torn"), "\u0000", "A star."]
    out = torch.full((len(values), 16), 7)
    reasons = spec.decode_valid(values, out)
    assert reasons == {
        1: "the value is null",
        2: "its text is empty",
        3: "it is int, not text",
        4: "it is ndarray, not text",
        5: "torn",
        6: "the tokenizer finds no token in its text",
    }
    assert torch.equal(out[0], spec.decode("The cat."))
    assert torch.equal(out[7], spec.decode("A star."))
    assert not out[1:7].any()
    with pytest.raises(ValueError, match="not text"):
        spec.decode(3)


def test_a_decoder_gives_the_same_with_threads_and_processes(spec):
    values = [*SENTENCES, None] * 8
    expected, why = Decoder(spec).decode(values)
    for threads, processes in ((3, 0), (1, 2)):
        with Decoder(spec, threads, processes) as decoder:
            found, reasons = decoder.decode(values)
        assert torch.equal(found, expected)
        assert reasons == why


def test_threads_share_a_tokenizer(folder):
    specs = [TextSpec(Tokenizer(str(folder), length)) for length in (8, 12, 16)]
    wrong = []

    def work(spec):
        for _ in range(30):
            found = [spec.decode(text) for text in SENTENCES]
            wrong.extend(row for row in found if len(row) != spec.shape[0])

    threads = [threading.Thread(target=work, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def table(**columns):
    return datasets.Dataset.from_dict(columns)


def test_the_only_column_of_text_is_found_and_the_other_sets_follow(spec):
    rows = open_labeled(
        Labeled(path="m", label="kind"),
        0,
        dataset=table(kind=["a", "b"] * 3, news=SENTENCES, number=range(6)),
        kind=TEXT,
    )
    assert rows.column == "news"
    test = table(news=SENTENCES[:2], kind=["b", "a"])
    assert open_test(LabelColumn(path="m"), rows, spec, dataset=test).column == "news"
    other = table(words=["A star.", None], n=[1, 2])
    assert open_unlabeled(Unlabeled(path="m"), rows, spec, dataset=other).column == "words"
    with pytest.raises(DataError, match=r"data\.unlabeled\.input: .* not text"):
        open_unlabeled(Unlabeled(path="m", input="n"), rows, spec, dataset=other)
    with pytest.raises(DataError, match=r"2 columns hold text.* are a \(text\), b \(text\)"):
        open_unlabeled(Unlabeled(path="m"), rows, spec, dataset=table(a=["x"], b=["y"]))


def test_a_column_of_text_needs_the_views_of_text():
    with pytest.raises(DataError, match=r"neither images .* for text set views\.name: text"):
        open_labeled(
            Labeled(path="m", input="news"), 0, dataset=table(news=["a", "b"], label=[0, 1])
        )
    rows = open_labeled(
        Labeled(path="m", input="v"), 0, dataset=table(v=[[1.0], [2.0]], label=[0, 1])
    )
    assert input_spec(rows).kind == "table"


def test_a_list_of_columns_is_never_text(spec):
    columns = {"text": SENTENCES, "age": range(6), "label": [0, 1] * 3}
    with pytest.raises(DataError, match=r"data\.labeled\.input: a list of columns is no text"):
        open_labeled(Labeled(path="m", input=["age"]), 0, dataset=table(**columns), kind=TEXT)
    rows = open_labeled(Labeled(path="m"), 0, dataset=table(**columns), kind=TEXT)
    with pytest.raises(DataError, match=r"data\.unlabeled\.input: a list of columns is no text"):
        open_unlabeled(Unlabeled(path="m", input=["age"]), rows, spec, dataset=table(**columns))
    with pytest.raises(DataError, match=r"data\.test\.input: a list of columns is no text"):
        open_test(LabelColumn(path="m", input=["age"]), rows, spec, dataset=table(**columns))


def test_bad_rows_hold_their_place_and_say_why(spec):
    rows = open_labeled(
        Labeled(path="m"), 0, dataset=table(text=SENTENCES, label=[0, 1] * 3), kind=TEXT
    )
    texts = [*SENTENCES, None, "", *SENTENCES]
    unlabeled = open_unlabeled(Unlabeled(path="m"), rows, spec, dataset=table(text=texts))
    stream = BatchStream(unlabeled, len(texts), 0, 1, 0, spec)
    batch = next(stream)
    stream.close()
    bad = {int(row) for row, valid in zip(batch.ids, batch.valid, strict=True) if not valid}
    assert bad == {6, 7}
    assert {row.id: row.reason for row in batch.bad} == {
        6: "the value is null",
        7: "its text is empty",
    }
    for row, ids in zip(batch.ids.tolist(), batch.inputs, strict=True):
        assert torch.equal(ids, spec.decode(texts[row])) if row not in bad else not ids.any()


def test_a_labelled_row_without_text_is_an_error(spec):
    rows = open_labeled(
        Labeled(path="m"), 0, dataset=table(text=["A star.", ""], label=[0, 1]), kind=TEXT
    )
    stream = BatchStream(rows, 2, 0, 1, 0, spec)
    with pytest.raises(DataError, match=r"row 1 cannot be decoded: its text is empty"):
        next(stream)
    stream.close()


def test_json_lines_of_text_are_converted(tmp_path, spec):
    table(text=SENTENCES, other=SENTENCES).to_json(tmp_path / "rows.jsonl")
    source = Unlabeled(path="json", data_files=str(tmp_path / "rows.jsonl"), input="text")
    written = convert(source, tmp_path / "out")
    assert (written.rows, written.input) == (len(SENTENCES), "text")
    unnamed = source.model_copy(update={"input": None})
    assert convert(unnamed, tmp_path / "like", input="text").input == "text"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./no-such-folder", "views.tokenizer: there is no folder './no-such-folder'"),
        ("{tmp}", "views.tokenizer: folder '.*' holds no config.json"),
        ("{tmp}/empty", "views.tokenizer: folder '.*' cannot be used: "),
    ],
)
def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, path, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=said) as refused:
        Tokenizer(path.format(tmp=tmp_path), 16).vocabulary  # noqa: B018
    assert "\n" not in str(refused.value)


def test_without_padding_token_the_end_token_pads(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    plain = AutoTokenizer.from_pretrained(tmp_path)
    plain.pad_token, plain.eos_token, plain.mask_token = None, "[SEP]", None
    plain.save_pretrained(tmp_path)
    vocabulary = Tokenizer(str(tmp_path), 16).vocabulary
    assert vocabulary.pad == plain.eos_token_id
    assert vocabulary.mask is None
