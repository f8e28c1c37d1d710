"""Several columns of numbers as one vector, from tables, Parquet and CSV."""

import datasets
import numpy as np
import pytest
import torch

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.errors import ConfigError, DataError
from hpdist.train.config import parse
from tests.support.labeled import open_labeled

COLUMNS = ["age", "member", "income"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def people(rows=12, **columns):
    given = {
        "city": ["Ulm"] * rows,
        "age": list(range(rows)),
        "member": [row % 2 == 0 for row in range(rows)],
        "income": [row / 4 for row in range(rows)],
        "label": [row % 2 for row in range(rows)],
    }
    return datasets.Dataset.from_dict(given | columns)


def expected(rows=12):
    return [[float(row), float(row % 2 == 0), row / 4] for row in range(rows)]


def labeled(table, **settings):
    config = Labeled(path="memory", **{"input": COLUMNS, **settings})
    return open_labeled(config, 0, dataset=table)


def batch_of(rows, spec, size=12):
    stream = BatchStream(rows, size, 0, 1, 0, spec)
    try:
        return next(stream)
    finally:
        stream.close()


def test_a_list_of_columns_is_a_vector_in_that_order():
    rows = labeled(people())
    spec = input_spec(rows)
    assert (spec.kind, spec.shape, spec.names) == ("table", (3,), tuple(COLUMNS))
    batch = batch_of(rows, spec)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.tolist() == [expected()[row] for row in batch.ids.tolist()]
    assert (batch.labels == batch.ids % 2).all()
    turned = input_spec(labeled(people(), input=COLUMNS[::-1]))
    assert turned.names == ("income", "member", "age")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_give_the_same_vectors(tmp_path, kind, streaming):
    table = people()
    getattr(table, f"to_{kind}")(str(tmp_path / f"rows.{kind}"))
    source = {"path": kind, "data_files": str(tmp_path / f"rows.{kind}")}
    rows = open_labeled(Labeled(**source, input=COLUMNS), 0)
    spec = input_spec(rows)
    unlabeled = open_unlabeled(Unlabeled(**source, streaming=streaming), rows, spec)
    batch = batch_of(unlabeled, spec)
    assert sorted(batch.inputs.tolist()) == expected()
    test = open_test(LabelColumn(**source), rows, spec)
    assert [value.tolist() for value in test.read(np.arange(12))] == expected()


def test_every_kind_of_number_will_do():
    kinds = ["int8", "uint64", "float16", "float32", "bool"]
    features = datasets.Features(
        {k: datasets.Value(k) for k in kinds} | {"label": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_dict(
        {k: [1, 0] for k in kinds} | {"label": [0, 1]}, features=features
    )
    rows = labeled(table, input=kinds)
    assert [value.tolist() for value in rows.read(np.arange(2))] == [[1.0] * 5, [0.0] * 5]


def test_a_gap_is_a_bad_row_or_is_let_through():
    table = people(age=[None, *range(1, 12)])
    rows = labeled(people())
    spec = input_spec(rows)
    batch = batch_of(open_unlabeled(Unlabeled(path="memory"), rows, spec, dataset=table), spec)
    (bad,) = batch.bad
    assert bad.id == 0
    assert "NaN or infinity in column 'age'" in bad.reason
    assert batch.valid is not None
    assert batch.ids[~batch.valid].tolist() == [0]
    spec = input_spec(rows, missing=True)
    batch = batch_of(open_unlabeled(Unlabeled(path="memory"), rows, spec, dataset=table), spec)
    assert not batch.bad
    assert batch.ids[batch.inputs[:, 0].isnan()].tolist() == [0]
    infinite = people(income=[float("inf"), *range(1, 12)])
    batch = batch_of(open_unlabeled(Unlabeled(path="memory"), rows, spec, dataset=infinite), spec)
    assert "in column 'income'" in batch.bad[0].reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["age", "label"], "data.labeled.input: column 'label' is the label; leave it out"),
        (["age", "age"], "data.labeled.input: column 'age' is there twice"),
        (["age", "aeg"], "data.labeled.input: there is no column 'aeg'; there are city, age"),
        (["age", "many"], "data.labeled.input: column 'many' holds List("),
        ("age", "numbers; a list makes a vector: [age]; candidates"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(given, message):
    table = people(many=[[1.0]] * 12)
    with pytest.raises(DataError) as caught:
        labeled(table, input=given, label="label")
    assert message in str(caught.value)


def test_another_order_of_the_same_columns_is_refused():
    rows = labeled(people())
    spec = input_spec(rows)
    turned = {"path": "memory", "input": COLUMNS[::-1]}
    with pytest.raises(DataError, match=r"data\.unlabeled\.input: .* in another order"):
        open_unlabeled(Unlabeled(**turned), rows, spec, dataset=people())
    with pytest.raises(DataError, match=r"data\.test\.input: .* in another order"):
        open_test(LabelColumn(**turned), rows, spec, dataset=people())
    with pytest.raises(DataError, match="its shape is 2, the first labelled row's is 3"):
        open_unlabeled(Unlabeled(path="memory", input=COLUMNS[:2]), rows, spec, dataset=people())


def test_filter_and_map_see_every_column(monkeypatch, tmp_path):
    module = """
def keep(row):
    return row["city"] == "Ulm" and row["age"] != 3

def older(row):
    return row | {"age": row["age"] + 100, "income": None if row["age"] == 5 else 1}
"""
    (tmp_path / "row_functions.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = labeled(people())
    spec = input_spec(rows)
    config = Unlabeled(
        path="memory",
        filter="python:row_functions:keep",
        map="python:row_functions:older",
        columns=["city"],
    )
    batch = batch_of(open_unlabeled(config, rows, spec, dataset=people()), spec)
    assert batch.valid is not None
    assert sorted(batch.ids[~batch.valid].tolist()) == [3, 5]
    assert [bad.id for bad in batch.bad] == [5]
    kept = batch.inputs[batch.valid]
    assert sorted(kept[:, 0].tolist()) == [100.0 + row for row in range(12) if row not in (3, 5)]
    assert (kept[:, 2] == 1).all()


def test_a_conversion_keeps_the_list(tmp_path):
    people().to_csv(str(tmp_path / "rows.csv"))
    source = Unlabeled(path="csv", data_files=str(tmp_path / "rows.csv"))
    written = convert(source, tmp_path / "out", input=COLUMNS)
    assert "input:\n    - age\n    - member\n    - income" in written.yaml()


def test_the_setting_takes_a_name_or_a_list():
    settings = {
        "model": {"name": "mlp"},
        "algorithm": {"name": "supervised"},
        "data": {"labeled": {"path": "csv", "input": ["a", "b"]}},
        "views": {"name": "table"},
        "steps": 1,
    }
    config = parse(settings)
    assert parse(config.model_dump(mode="json")).data.labeled.input == ["a", "b"]
    for wrong in ([], {"a": 1}):
        settings["data"]["labeled"]["input"] = wrong
        with pytest.raises(ConfigError, match=r"data\.labeled\.input"):
            parse(settings)
