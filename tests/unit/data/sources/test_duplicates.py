"""Held-out rows among the rows to train on: images, text, vectors, columns, from real Parquet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpdist.data.config import Duplicates, LabelColumn, Labeled, Unlabeled
from hpdist.data.kinds import TEXT, input_spec
from hpdist.data.sources.duplicates import Report, find_duplicates
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled
from tests.support.labeled import open_labeled

AUTO = Duplicates()


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], Any]] = {
    "images": (lambda row: {"x": {"bytes": picture(row), "path": None}}, "x"),
    "vectors": (lambda row: {"x": [row / 7, row / 3]}, "x"),
    "columns": (lambda row: {"a": row / 7, "b": row, "c": row % 2 == 0}, ["a", "b", "c"]),
}


def write(path: Path, rows: list[dict[str, Any]], labels: bool, group: int = 4) -> str:
    rows = [{**row, "label": number % 2} if labels else row for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def opened(
    folder: Path,
    make: Callable[[int], dict[str, Any]],
    column: Any,
    *,
    unlabeled: dict[str, list[int]],
    streaming: bool,
    test: list[int],
    labeled: list[int],
    **settings: Any,
) -> tuple[dict[str, LabeledRows], dict[str, Any]]:
    def source(name: str, numbers: list[int], labels: bool = True) -> dict[str, Any]:
        rows = [make(number) for number in numbers]
        return {
            "path": "parquet",
            "data_files": write(folder / f"{name}.parquet", rows, labels),
            "input": column,
        }

    like = open_labeled(Labeled(**source("labeled", labeled)), 0)
    spec = input_spec(like)
    held = open_test(LabelColumn(**source("test", test)), like, spec)
    for name, numbers in unlabeled.items():
        source(name, numbers, False)
    files = [str(folder / f"{name}.parquet") for name in unlabeled]
    config = Unlabeled(
        path="parquet", data_files=files, input=column, streaming=streaming, **settings
    )
    return {"test": held}, {"labeled": like, "unlabeled": open_unlabeled(config, like, spec)}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_are_counted_and_named(tmp_path: Path, kind: str, streaming: bool) -> None:
    make, column = KINDS[kind]
    sets = opened(
        tmp_path,
        make,
        column,
        unlabeled={"first": list(range(100, 110)), "second": [201, 202, 203, 204, 55, 7, 7]},
        streaming=streaming,
        test=[50, 55, 7, 60, 7],  # two in the unlabelled rows, one of them twice there and here
        labeled=[1, 2, 60],
    )
    report = find_duplicates(AUTO, *sets)
    assert report.summary == {"test/duplicates_in_labeled": 1, "test/duplicates_in_unlabeled": 3}
    (line,) = report.lines
    test, labeled, second = (tmp_path / f"{n}.parquet" for n in ("test", "labeled", "second"))
    assert line.startswith(
        "duplicates: of 5 rows of data.test 1 are in data.labeled "
        f"(row 3 ({test}, row 3) is row 2 ({labeled}, row 2))"
    )
    place = f"{second}, row group 1, row 0" if streaming else f"row 14 ({second}, row 4)"
    assert f"row 1 ({test}, row 1) is {place}" in line
    assert Report(**report.to_json()) == report


def test_no_duplicates_are_said_to_be_none(tmp_path: Path) -> None:
    sets = opened(
        tmp_path,
        *KINDS["vectors"],
        unlabeled={"only": [10, 11]},
        streaming=True,
        test=[20, 21],
        labeled=[1, 2],
    )
    report = find_duplicates(AUTO, *sets)
    expected = "of 2 rows of data.test none are in data.labeled, none are in data.unlabeled"
    assert report.lines == [f"duplicates: {expected}"]


def test_texts_and_what_differs_by_a_space(tmp_path: Path) -> None:
    def source(name: str, texts: list[Any], labels: bool) -> dict[str, Any]:
        path = write(tmp_path / f"{name}.parquet", [{"text": text} for text in texts], labels)
        return {"path": "parquet", "data_files": path, "input": "text"}

    like = open_labeled(Labeled(**source("labeled", ["Öl steigt.", "b"], True)), 0, kind=TEXT)

    held = open_labeled(
        Labeled(**source("test", ["a", "Öl steigt.", "b ", None], True)), 0, kind=TEXT
    )
    found = find_duplicates(AUTO, {"test": held}, {"labeled": like})
    assert found.summary == {"test/duplicates_in_labeled": 1}
    assert "of 3 rows of data.test 1 are in data.labeled (row 1 (" in found.lines[0]


def test_images_that_a_table_only_names(tmp_path: Path) -> None:
    for part, numbers in {"labeled": [1, 2], "test": [3, 2], "unlabeled": [3, 4, 5]}.items():
        for place, number in enumerate(numbers):
            folder = tmp_path / part / ("cat", "dog")[place % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(picture(number))
    like = open_labeled(Labeled(path=str(tmp_path / "labeled")), 0)
    spec = input_spec(like)
    held = {"test": open_test(LabelColumn(path=str(tmp_path / "test")), like, spec)}
    unlabeled = open_unlabeled(Unlabeled(path=str(tmp_path / "unlabeled")), like, spec)
    pools = {"labeled": like, "unlabeled": unlabeled}
    report = find_duplicates(AUTO, held, pools)
    assert report.summary == {"test/duplicates_in_labeled": 1, "test/duplicates_in_unlabeled": 1}
    small = find_duplicates(Duplicates(most_bytes=len(picture(3)) * 2 + 60), held, pools)
    assert "test/duplicates_in_unlabeled" not in small.summary
    assert "data.unlabeled was not compared: it holds more than" in small.lines[0]


def test_what_a_filter_leaves_out_is_not_trained_on(tmp_path: Path) -> None:
    make, column = KINDS["columns"]
    sets = opened(
        tmp_path,
        make,
        column,
        unlabeled={"only": [10, 50, 51]},
        streaming=True,
        test=[50, 51],
        labeled=[1, 2],
        filter="python:tests.unit.data.sources.test_duplicates:is_even",
    )
    assert find_duplicates(AUTO, *sets).summary["test/duplicates_in_unlabeled"] == 1


def is_even(row: dict[str, Any]) -> bool:
    return bool(row["b"] % 2 == 0)


def test_sets_that_are_mixed_name_the_part(tmp_path: Path) -> None:
    make, column = KINDS["vectors"]
    held, pools = opened(
        tmp_path,
        make,
        column,
        unlabeled={"one": [10, 11, 12], "two": [50, 13]},
        streaming=True,
        test=[50, 51],
        labeled=[1, 2],
    )
    parts = [
        {"path": "parquet", "data_files": str(tmp_path / f"{name}.parquet"), "input": column}
        | ({"streaming": True} if name == "two" else {})
        for name in ("one", "two")
    ]
    like = pools["labeled"]
    mixed: AnyUnlabeled = open_unlabeled(Unlabeled(mix=parts), like, input_spec(like))  # type: ignore[arg-type]
    report = find_duplicates(AUTO, held, {"unlabeled": mixed})
    assert report.summary == {"test/duplicates_in_unlabeled": 1}
    assert ", row 0) is data.unlabeled.mix.1 (parquet" in report.lines[0]
    assert "two.parquet, row group 0, row 0" in report.lines[0]


def test_nothing_is_left_out_without_a_word(tmp_path: Path) -> None:
    make, column = KINDS["vectors"]
    held, pools = opened(
        tmp_path,
        make,
        column,
        unlabeled={"only": [10, 50]},
        streaming=True,
        test=[50, 51],
        labeled=[1, 2],
    )
    assert find_duplicates(AUTO, {}, pools).lines == [
        "duplicates: not looked for, there is no test or validation set"
    ]
    never = find_duplicates(Duplicates(check="never"), held, pools)
    assert never.lines == ["duplicates: not looked for (data.duplicates.check: never)"]
    few = find_duplicates(Duplicates(most_bytes=10), held, pools)
    assert few.lines[0].startswith("duplicates: data.test was not compared: it holds more than 10")
    assert few.summary["duplicates_not_compared"] == [few.lines[0].removeprefix("duplicates: ")]


def test_a_stream_without_an_end_known_is_only_read_when_asked(tmp_path: Path) -> None:
    make, column = KINDS["vectors"]
    held, pools = opened(
        tmp_path,
        make,
        column,
        unlabeled={"only": [10]},
        streaming=True,
        test=[50, 51],
        labeled=[1, 2],
    )
    rows = datasets.Dataset.from_list([make(number) for number in [*range(3000), 50]])
    like = pools["labeled"]
    stream = open_unlabeled(
        Unlabeled(path="memory", input=column),
        like,
        input_spec(like),
        dataset=rows.to_iterable_dataset(),
    )
    auto = find_duplicates(AUTO, held, {"unlabeled": stream})
    assert "does not say how large it is; data.duplicates.check: always" in auto.lines[0]
    always = find_duplicates(Duplicates(check="always"), held, {"unlabeled": stream})
    assert always.summary == {"test/duplicates_in_unlabeled": 2}
