"""CSV and JSON as people write them: separators, decimals, encodings, headers, compression."""

import gzip
import json

import datasets
import numpy as np
import pytest

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.errors import ConfigError, DataError
from tests.support.labeled import open_labeled

ROWS = [("a", "b", "label"), ("1.5", "1000.0", "été"), ("2.5", "2000.0", "no")]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def text(sep=",", rows=ROWS):
    return "".join(sep.join(row) + "\n" for row in rows)


def check(file, options=None, **settings):
    """A CSV file is read alike as labelled, test and unlabelled rows, as a table and streamed."""
    named = {"path": "csv", "data_files": str(file), "input": ["a", "b"], "options": options or {}}
    named |= settings
    rows = open_labeled(Labeled(**named), 0)
    assert [v.tolist() for v in rows.read(np.arange(2))] == [[1.5, 1000.0], [2.5, 2000.0]]
    spec = input_spec(rows)
    label = {"label": named.pop("label")} if "label" in named else {}
    assert (
        open_test(LabelColumn(**named, **label), rows, spec).labels.tolist() == rows.labels.tolist()
    )
    for streaming in (False, True):
        unlabeled = open_unlabeled(Unlabeled(**named, streaming=streaming), rows, spec)
        reader = unlabeled.reader(0, 2)
        read = unlabeled.values(reader.read(0, 2, 0, 2)).values
        reader.close()
        assert sorted(v.tolist() for v in read) == [[1.5, 1000.0], [2.5, 2000.0]]
    return rows.classes.names


@pytest.mark.parametrize("sep", [";", "\t", "|"])
def test_a_separator(tmp_path, sep):
    (tmp_path / "rows.csv").write_text(text(sep))
    assert check(tmp_path / "rows.csv", {"sep": sep}) == ("no", "été")
    like = open_labeled(
        Labeled(
            path="csv", data_files=str(tmp_path / "rows.csv"), options={"sep": sep}, input=["a"]
        ),
        0,
    )
    named = {"path": "csv", "data_files": str(tmp_path / "rows.csv")}
    message = r"there is one column, .*; set options: {sep: "
    with pytest.raises(DataError, match=f"data.labeled: {message}"):
        open_labeled(Labeled(**named), 0)
    for streaming in (False, True):
        with pytest.raises(DataError, match=f"data.unlabeled: {message}"):
            open_unlabeled(Unlabeled(**named, streaming=streaming), like, input_spec(like))


def test_tabs_need_no_option_where_the_name_says_so(tmp_path):
    (tmp_path / "rows.tsv").write_text(text("\t"))
    assert check(tmp_path / "rows.tsv") == ("no", "été")
    assert check(tmp_path / "rows.tsv", path=str(tmp_path), data_files=None) == ("no", "été")
    (tmp_path / "rows.tsv").write_text(text(";"))
    assert check(tmp_path / "rows.tsv", {"sep": ";"}) == ("no", "été")
    (tmp_path / "rows.csv").write_text(text())
    with pytest.raises(DataError, match=r"data_files: there are .csv and .tsv files"):
        check(tmp_path, path=str(tmp_path), data_files=None)


def test_decimal_commas_and_thousands(tmp_path):
    rows = [ROWS[0], ("1,5", "1.000,0", "été"), ("2,5", "2.000,0", "no")]
    (tmp_path / "rows.csv").write_text(text(";", rows))
    check(tmp_path / "rows.csv", {"sep": ";", "decimal": ",", "thousands": "."})


@pytest.mark.parametrize(("encoding", "told"), [("latin-1", ".*latin-1"), ("utf-16", "utf-16")])
def test_an_encoding(tmp_path, encoding, told):
    (tmp_path / "rows.csv").write_bytes(text().encode(encoding))
    assert check(tmp_path / "rows.csv", {"encoding": encoding}) == ("no", "été")
    message = rf"UTF-8: set options: {{encoding: .*{told}"
    with pytest.raises(DataError, match=f"rows.csv .*{message}"):
        check(tmp_path / "rows.csv")
    named = {"path": "csv", "data_files": str(tmp_path / "rows.csv"), "input": ["a", "b"]}
    like = open_labeled(Labeled(**named, options={"encoding": encoding}), 0)
    with pytest.raises(DataError, match=f"data.unlabeled .*{message}"):
        open_unlabeled(Unlabeled(**named, streaming=True), like, input_spec(like))


@pytest.mark.parametrize(
    ("written", "message", "options"),
    [
        ("a;b;label\n1,5;1000,0;été\n2,5;2000,0;no\n", 'sep: ";"', {"sep": ";", "decimal": ","}),
        ("a, b, label\n1.5, 1000, été\n2.5, 2000, no\n", "' b'.*skipini", {"skipinitialspace": 1}),
        ("# of today\na,b,label\n1.5,1000,été\n2.5,2000,no\n", "comment: ", {"comment": "#"}),
        ("1.5,1000,été\n2.5,2000,no\n", "1.5, 1000, été, .*names: ", {"names": list(ROWS[0])}),
    ],
)
def test_names_that_are_none_tell_the_dialect(tmp_path, written, message, options):
    (tmp_path / "rows.csv").write_text(written)
    with pytest.raises(DataError, match=f"^data.labeled: .*{message}"):
        check(tmp_path / "rows.csv")
    assert check(tmp_path / "rows.csv", options) == ("no", "été")


def test_numbers_may_be_names_of_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("0,1,label\n1.5,1000,été\n2.5,2000,no\n")
    assert check(tmp_path / "rows.csv", input=["0", "1"]) == ("no", "été")


def test_a_broken_line_names_its_file_once(tmp_path, capfd):
    (tmp_path / "rows.csv").write_text(text() + "1,2,no,3,4\n")
    message = r"rows.csv cannot be read with options {thousands: ' '}: .*line 4.*on_bad_lines: skip"
    with pytest.raises(DataError, match=message):
        check(tmp_path / "rows.csv", {"thousands": " "})
    assert "Failed to read" not in capfd.readouterr().err
    check(tmp_path / "rows.csv", {"on_bad_lines": "skip"})


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "rows.csv").write_bytes(text().encode("utf-8-sig"))
    assert check(tmp_path / "rows.csv") == ("no", "été")


def test_no_header(tmp_path):
    (tmp_path / "rows.csv").write_text(text(rows=ROWS[1:]))
    check(tmp_path / "rows.csv", {"names": ["a", "b", "label"]})
    check(tmp_path / "rows.csv", {"header": None}, input=["0", "1"], label="2")


def test_quotes(tmp_path):
    rows = [ROWS[0], ("'1.5'", "1000.0", "'été, tard'"), ("2.5", "2000.0", "no")]
    (tmp_path / "rows.csv").write_text(text(rows=rows))
    assert check(tmp_path / "rows.csv", {"quotechar": "'"}) == ("no", "été, tard")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_compressed(tmp_path, kind):
    sep = "\t" if kind == "tsv" else ","
    with gzip.open(tmp_path / f"rows.{kind}.gz", "wb") as file:
        file.write(text(sep).encode())
    check(tmp_path / f"rows.{kind}.gz")
    with gzip.open(tmp_path / f"empty.{kind}.gz", "wb") as file:
        file.write(b"")
    check(tmp_path, path=str(tmp_path), data_files=None)


def test_a_field_of_json(tmp_path):
    rows = [dict(zip(ROWS[0], (float(a), float(b), c), strict=True)) for a, b, c in ROWS[1:]]
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": rows}))
    check(tmp_path / "rows.json", {"field": "data"}, path="json")


def test_options_reach_a_conversion(tmp_path):
    (tmp_path / "rows.csv").write_text(text(";"))
    named = {"path": "csv", "data_files": str(tmp_path / "rows.csv"), "input": ["a", "b"]}
    with pytest.raises(DataError, match=r"data.unlabeled: there is one column"):
        convert(Unlabeled(**named), tmp_path / "out")
    written = convert(Unlabeled(**named, options={"sep": ";"}), tmp_path / "out")
    assert written.rows == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"seperator": ";"},
            r"data.labeled.options: csv has no option 'seperator'; .*there are sep",
        ),
        ({"encodng": "latin-1"}, "did you mean 'encoding'"),
        ({"data_dir": "/"}, "csv has no option 'data_dir'"),
        ({"trust_remote_code": True}, "csv has no option 'trust_remote_code'"),
        ({"converters": {"a": "eval"}}, "csv has no option 'converters'"),
    ],
)
def test_options_are_those_of_the_builder(tmp_path, options, message):
    (tmp_path / "rows.csv").write_text(text())
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "rows.csv", options)


def test_options_of_parquet(tmp_path):
    table = datasets.Dataset.from_dict({"a": [1.0, 2.0], "b": [1.0, 2.0], "label": ["x", "y"]})
    table.to_parquet(tmp_path / "rows.parquet")
    like = open_labeled(Labeled(path=str(tmp_path), input=["a", "b"]), 0)
    spec = input_spec(like)
    config = {"path": str(tmp_path), "options": {"columns": ["a", "label"]}}
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"there is no column 'b'"):
            open_unlabeled(Unlabeled(**config, streaming=streaming, input=["a", "b"]), like, spec)
    config["options"] = {"filters": [["a", ">", 1.5]]}
    rows = open_unlabeled(Unlabeled(**config), like, spec)
    assert len(rows) == 1
    with pytest.raises(ConfigError, match="streamed Parquet has no option 'filters'"):
        open_unlabeled(Unlabeled(**config, streaming=True), like, spec)
