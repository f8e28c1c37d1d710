"""Classes are the labels that are there, by value, whatever type they are stored in."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.errors import CheckpointError, DataError
from hpdist.tasks import make_task
from hpdist.train.trainer import Trainer
from tests.support.labeled import open_labeled

MULTILABEL = make_task(name="multilabel")


def table(labels: Any, kind: pa.DataType | None = None) -> datasets.Dataset:
    """Rows of vectors with a column of labels of an Arrow type."""
    column = labels if isinstance(labels, pa.Array) else pa.array(labels, kind)
    inputs = pa.array([[float(row), 1.0] for row in range(len(column))])
    return datasets.Dataset(pa.table({"x": inputs, "label": column}))


def named(labels: list[Any], names: list[str]) -> datasets.Dataset:
    """Rows of vectors with a ClassLabel."""
    rows = {"x": [[float(row), 1.0] for row in range(len(labels))], "label": labels}
    features = Features({"x": List(Value("float64")), "label": ClassLabel(names=names)})
    return datasets.Dataset.from_dict(rows, features=features)


def opened(data: datasets.Dataset, **settings: Any) -> LabeledRows:
    options = {
        key: settings.pop(key) for key in ("num_classes", "labels", "classes") & settings.keys()
    }
    return open_labeled(Labeled(path="m", input="x", **settings), 0, dataset=data, **options)


def held_out(data: datasets.Dataset, like: LabeledRows) -> LabeledRows:
    return open_test(LabelColumn(path="m", input="x"), like, input_spec(like), dataset=data)


def view_of(values: Sequence[str]) -> pa.Array:
    return pa.array(values, pa.string_view())


DAYS = [dt.date(2024, 12, 24), dt.date(2024, 2, 29), dt.date(2024, 12, 24)]
STORED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "from one": (pa.array([2, 1, 2], pa.int8()), ("1", "2")),
    "gaps": (pa.array([900, 20, 900]), ("20", "900")),
    "negative": (pa.array([3, -7, 3]), ("-7", "3")),
    "ids": (
        pa.array([2**63 + 5, 2**53 + 1, 2**63 + 5], pa.uint64()),
        (str(2**53 + 1), str(2**63 + 5)),
    ),
    "floats": (pa.array([10.0, 2.0, 10.0], pa.float32()), ("2", "10")),
    "half": (pa.array(np.array([10, 2, 10], np.float16)), ("2", "10")),
    "decimals": (pa.array([Decimal("10.00"), Decimal("2.00"), Decimal("10.00")]), ("2", "10")),
    "booleans": (pa.array([True, False, True]), ("False", "True")),
    "strings": (pa.array(["pear", "fig", "pear"]), ("fig", "pear")),
    "digits as text": (pa.array(["2", "10", "2"]), ("10", "2")),  # alphabetically, as ever
    "leading zeros": (pa.array(["10", "010", "10"]), ("010", "10")),
    "large strings": (pa.array(["pear", "fig", "pear"], pa.large_string()), ("fig", "pear")),
    "string views": (view_of(["pear", "fig", "pear"]), ("fig", "pear")),
    "categories": (pa.array(["pear", "fig", "pear"]).dictionary_encode(), ("fig", "pear")),
    "numbers as categories": (pa.array([10, 2, 10]).dictionary_encode(), ("2", "10")),
    "bytes": (pa.array([b"pear", b"fig", b"pear"]), ("fig", "pear")),
    "byte views": (pa.array([b"pear", b"fig", b"pear"], pa.binary_view()), ("fig", "pear")),
    "fixed bytes": (
        pa.array([b"\xff\x01", b"\x02\xfe", b"\xff\x01"], pa.binary(2)),
        ("0x02fe", "0xff01"),
    ),
    "dates": (pa.array(DAYS), ("2024-02-29", "2024-12-24")),
    "days as times": (pa.array(DAYS).cast(pa.timestamp("ns")), ("2024-02-29", "2024-12-24")),
    "hours": (pa.array([dt.time(18), dt.time(9, 30), dt.time(18)]), ("09:30:00", "18:00:00")),
}


@pytest.mark.parametrize("kind", STORED)
def test_classes_are_the_labels_that_are_there(kind: str, tmp_path: Path) -> None:
    stored, names = STORED[kind]
    rows = opened(table(stored))
    assert rows.classes.names == names
    assert rows.labels.tolist() == [1, 0, 1]
    assert rows.labels.dtype == np.int64
    assert rows.notes == ()
    assert held_out(table(stored[1:]), rows).labels.tolist() == [0, 1]
    # Through a file, whose reader may choose other types, the classes are the same.
    pq.write_table(
        pa.table({"x": pa.array([[0.0, 1.0]] * 3), "label": stored}), tmp_path / "a.parquet"
    )
    config = Labeled(path="parquet", data_files=str(tmp_path / "a.parquet"), input="x")
    assert open_labeled(config, 0).classes.names == names


ALIKE: list[tuple[Any, Any, bool]] = [
    # The labelled set's labels, those of a test set in another type, whether that is said.
    (pa.array(["1", "2", "10"]), pa.array([1, 2, 10]), True),
    (pa.array([1, 2, 10]), pa.array(["1", "2", "10"]), True),
    (pa.array([1, 2, 10]), pa.array([1.0, 2.0, 10.0]), False),
    (pa.array([1.0, 2.0, 10.0]), pa.array([1, 2, 10], pa.uint16()), False),
    (pa.array([Decimal(1), Decimal(2)]), pa.array(["1", "2"]), True),
    (pa.array(["False", "True"]), pa.array([False, True]), True),
    (pa.array([False, True]), pa.array(["false", "true"]), True),
    (pa.array([False, True]), pa.array([0, 1]), True),
    (pa.array([0, 1]), pa.array([False, True]), True),
    (pa.array(["2024-02-29", "2024-12-24"]), pa.array(DAYS[1::-1]), True),
    (pa.array(DAYS[1::-1]), pa.array(DAYS[1::-1]).cast(pa.timestamp("us")), False),
    (pa.array(["a", "b"]), pa.array([b"a", b"b"]), False),
]


@pytest.mark.parametrize("case", range(len(ALIKE)))
def test_labels_of_another_type_are_matched_by_how_they_are_written(case: int) -> None:
    first, other, surprising = ALIKE[case]
    rows = opened(table(first))
    test = held_out(table(other), rows)
    assert [rows.classes.names[label] for label in test.labels] == [
        rows.classes.names[label] for label in rows.labels
    ]
    assert bool(test.notes) == surprising
    if surprising:
        (note,) = test.notes
        assert "note: data.test: the labels are Value" in note
        assert "matched by how they are written" in note


@pytest.mark.parametrize(
    ("first", "other", "types"),
    [
        (["cat", "dog"], [0, 1], ("Value('int64') (0, 1)", "Value('string') (cat, dog)")),
        ([0, 1, 2], ["cat", "dog"], ("Value('string') (cat, dog)", "Value('int64') (0, 1, 2)")),
        (["01", "02"], [1, 2], ("Value('int64') (1, 2)", "Value('string') (01, 02)")),
        ([1, 2, 3], [True, False], ("Value('bool') (False, True)", "Value('int64') (1, 2, 3)")),
    ],
)
def test_labels_of_another_type_that_match_none_are_refused_with_both(
    first: list[Any], other: list[Any], types: tuple[str, str]
) -> None:
    rows = opened(table(first))
    with pytest.raises(DataError, match="no class is in both; write them alike") as caught:
        held_out(table(other), rows)
    assert all(kind in str(caught.value) for kind in types)


def test_another_unit_of_time_that_matches_none_is_refused_with_both() -> None:
    moments = [dt.datetime(2024, 1, day) for day in (1, 2)]
    like = opened(table(moments, pa.timestamp("us")))
    assert held_out(table([day.date() for day in moments]), like).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"tz=UTC.*, the labels of data.labeled are .*\[us\]"):
        held_out(table(moments, pa.timestamp("us", tz="UTC")), like)


def test_bytes_that_are_no_text_are_written_in_hexadecimal() -> None:
    ids = [uuid.UUID(int=number).bytes for number in (1, 2)]
    names = ("0x" + "0" * 31 + "1", "0x" + "0" * 31 + "2")
    assert opened(table(ids, pa.binary(16))).classes.names == names


def test_a_class_label_keeps_its_names_and_its_order() -> None:
    rows = opened(named([2, 0, 2], ["owl", "elk", "ant"]))
    assert rows.classes.names == ("owl", "elk", "ant")
    assert rows.labels.tolist() == [2, 0, 2]
    assert rows.notes == ("note: data.labeled has no row of 1 of the 3 classes: elk",)
    turned = held_out(named([0, 1, 2], ["ant", "owl", "elk"]), rows)
    assert turned.labels.tolist() == [2, 0, 1]
    assert turned.notes == ()
    assert held_out(table(["ant", "elk"]), rows).labels.tolist() == [2, 1]
    with pytest.raises(DataError, match=r"row 1 has the label 'bat' .* none of the 3 classes"):
        held_out(named([0, 1], ["ant", "bat"]), rows)
    with pytest.raises(DataError, match=r"row 0 has the label 'bat' .* \(owl, elk, ant\)"):
        held_out(named([0, 0], ["bat", "cow"]), rows)


def test_integers_beside_a_class_label_are_those_that_it_stores() -> None:
    rows = opened(named([2, 0, 1], ["owl", "elk", "ant"]))
    test = held_out(table([0, 2]), rows)
    assert test.labels.tolist() == [0, 2]
    assert "by the integers that a ClassLabel stores (0 is 'owl', 2 is 'ant')" in test.notes[0]
    numbers = opened(table([2, 5, 1]))
    turned = held_out(named([2, 1, 2], ["owl", "elk", "ant"]), numbers)
    assert [numbers.classes.names[label] for label in turned.labels] == ["2", "1", "2"]
    assert "(1 is '1', 2 is '2')" in turned.notes[0]
    digits = opened(named([0, 1, 2], ["10", "1", "2"]))  # by name, not by place
    assert held_out(table([10, 1, 2]), digits).labels.tolist() == [0, 1, 2]


def test_what_cannot_be_a_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1 has the label 0.5 .* no whole number.*regression"):
        opened(table([1.0, 0.5]))
    with pytest.raises(
        DataError, match=r"data.labeled.label: column 'label' is \{'a'.*integers or"
    ):
        opened(table([{"a": 1}, {"a": 2}]))
    rows = opened(table([1, 2]))
    with pytest.raises(DataError, match=r"data.test.*row 1 has the label 2.5 .* none of the 2"):
        held_out(table([1.0, 2.5]), rows)
    with pytest.raises(
        DataError, match=r"row 1 has the label 7 .* \(1, 2\); it is the first of 2 such"
    ):
        held_out(table([1, 7, 8]), rows)


def test_the_number_of_classes_may_be_larger_for_numbers_from_zero() -> None:
    assert opened(table([1, 3, 0]), num_classes=3).classes.names == ("0", "1", "3")
    larger = opened(table([1, 3, 0]), num_classes=5)
    assert larger.classes.names == ("0", "1", "2", "3", "4")
    assert larger.labels.tolist() == [1, 3, 0]
    assert "no row of 2 of the 5 classes: 2, 4" in larger.notes[0]
    for labels in ([1, 5, 0], [-3, 1, 0], ["1", "3", "0"]):
        with pytest.raises(DataError, match=r"has 3 classes, but model.num_classes is 5; make"):
            opened(table(labels), num_classes=5)
    with pytest.raises(DataError, match=r"has 3 classes, but model.num_classes is 2; .* 0, 1, 3\)"):
        opened(table([1, 3, 0]), num_classes=2)


def test_a_run_that_goes_on_keeps_its_classes() -> None:
    before = ("0", "1", "2", "3")  # every number up to the largest
    rows = opened(table([1, 3, 2]), classes=before)
    assert rows.classes.names == before
    assert rows.labels.tolist() == [1, 3, 2]
    assert opened(table([True, False]), classes=("0", "1")).labels.tolist() == [1, 0]
    turned = opened(named([0, 1], ["a", "b"]), classes=("b", "a"))
    assert (turned.classes.names, turned.labels.tolist()) == (("b", "a"), [1, 0])
    other = opened(table([1, 3, 9]), classes=before)  # which the checkpoint then refuses
    assert other.classes.names == ("1", "3", "9")


def test_draws_and_counts_go_by_the_classes_that_are_there() -> None:
    labels = np.random.default_rng(0).choice([5, 70, 900], 60).tolist()
    rows = opened(table(labels), labels_per_class=4)
    assert np.bincount(rows.labels).tolist() == [4, 4, 4]
    texts = [str(label) for label in labels]  # which come in the same order
    assert rows.chosen == opened(table(texts), labels_per_class=4).chosen
    assert [rows.classes.names[label] for label in rows.labels] == [
        str(labels[row]) for row in rows.chosen
    ]
    with pytest.raises(DataError, match=r"labels_per_class: 50 asked for, class '5' has \d+"):
        opened(table(labels), labels_per_class=50)


def test_a_missing_class_and_one_alone_are_said() -> None:
    rows = opened(table(["a", "b", "c"]))
    assert held_out(table(["c", "c"]), rows).notes == (
        "note: data.test has no row of 2 of the 3 classes: a, b",
    )
    assert opened(table(["a", "b", "c"]), indices=[0, 1]).notes == (
        "note: data.labeled has no row of 1 of the 3 classes: c",
    )
    assert opened(table([4, 4])).notes == ("note: data.labeled has rows of one class alone, '4'",)


def test_a_row_is_named_by_its_own_file(tmp_path: Path) -> None:
    for place in ("labeled/cat/0", "labeled/dog/0", "test/cat/0", "test/elk/7"):
        file = tmp_path / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    rows = open_labeled(Labeled(path=str(tmp_path / "labeled")), 0)
    with pytest.raises(DataError, match=r"row 1 \(.*test/elk/7.png\) has the label 'elk'"):
        open_test(LabelColumn(path=str(tmp_path / "test")), rows, input_spec(rows))


LISTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "gaps": (pa.array([[900], [20, 5], []]), ("5", "20", "900")),
    "strings": (pa.array([["c"], ["b", "a"], []]), ("a", "b", "c")),
    "views": (pa.array([["c"], ["b", "a"], []], pa.list_(pa.string_view())), ("a", "b", "c")),
    "large lists": (
        pa.array([["c"], ["b", "a"], []], pa.large_list(pa.large_string())),
        ("a", "b", "c"),
    ),
    "dates": (
        pa.array([[DAYS[0]], [DAYS[1], dt.date(2023, 1, 1)], []]),
        ("2023-01-01", "2024-02-29", "2024-12-24"),
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_labels_have_the_classes_that_are_there(kind: str) -> None:
    stored, names = LISTS[kind]
    rows = opened(table(stored), labels=MULTILABEL)
    assert rows.classes.names == names
    assert rows.labels.tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    turned = pa.array(stored.to_pylist()[::-1], stored.type)
    assert held_out(table(turned), rows).labels.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_lists_in_another_type_are_matched_too() -> None:
    rows = opened(table([[10], [2, 3], []]), labels=MULTILABEL)
    test = held_out(table([["3", "10"], ["2"]]), rows)
    assert test.labels.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert "matched by how they are written" in test.notes[0]
    with pytest.raises(DataError, match=r"row 1 .*: '7' is none of the 3 classes \(2, 3, 10\)"):
        held_out(table([["3"], ["7"]]), rows)
    with pytest.raises(DataError, match="no class is in both"):
        held_out(table([["x"], ["y"]]), rows)


def test_a_long_tail_is_drawn_by_labels_of_another_type() -> None:
    like = opened(table([3, 30, 300]))
    labels = ["3"] * 8 + ["30"] * 8 + ["300"] * 8 + [None] * 5 + [""]
    config = Unlabeled(path="m", input="x", imbalance=4)
    rows = open_unlabeled(config, like, input_spec(like), dataset=table(labels))
    counted = [sum(labels[row] == name for row in rows.ids) for name in ("3", "30", "300")]  # type: ignore[union-attr]
    assert counted == [8, 4, 2]
    notes = rows.notes  # type: ignore[union-attr]
    assert "data.unlabeled: 24 of 30 rows have a label" in notes[0]
    assert "matched by how they are written" in notes[1]


def test_a_run_names_its_classes_and_goes_on_with_them_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(labels: list[Any], steps: int) -> dict[str, object]:
        return Trainer(
            {"name": "mlp", "hidden": [4]},
            "fixmatch",
            labeled=(table(labels), {"input": "x"}),
            unlabeled=(table(labels), {"input": "x"}),
            test=(table(["900", "5", ""]), {"input": "x"}),
            batch={"labeled": 2, "unlabeled": 4},
            views={"name": "identity"},
            steps=steps,
            run={"dir": str(tmp_path), "name": "run"},
            tracker={"name": "none"},
        ).fit()

    run([5, 900, 70, None], 1)
    said = capfd.readouterr().err.splitlines()
    for line in (
        "data.labeled: 3 of 4 rows have a label in column 'label'; the others (null; the first is "
        "row 3) are passed over as unlabelled",
        "data.test: 2 of 3 rows have a label in column 'label'; the others (an empty text; the "
        "first is row 2) are passed over as unlabelled",
        "note: data.test has no row of 1 of the 3 classes: 70",
    ):
        assert said.count(line) == 1, line
    measured = json.loads((tmp_path / "run" / "confusion_test.json").read_text())
    assert measured["classes"] == ["5", "70", "900"]
    assert [sum(row) for row in measured["teacher"]] == [1, 0, 1]
    run([5, 900, 70, None], 2)
    with pytest.raises(CheckpointError, match=r"classes: \['5', '70', '900'\] there, \['5', '71'"):
        run([5, 900, 71, None], 3)
