"""How a column of objects is read, from Parquet: padded boxes, and every bad one by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, open_labeled, open_test
from hpdist.errors import DataError
from hpdist.tasks import make_task

CELLS = ClassLabel(names=["red", "white"])
TASK = make_task("detection")
DROPPING = make_task("detection", bad_boxes="drop")


def objects(category: Any = CELLS) -> Any:
    return {"bbox": List(List(Value("float32"), length=4)), "category": List(category)}


def picture(width: int, height: int, orientation: int | None = None) -> dict[str, Any]:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(out, "JPEG", exif=exif)
    return {"bytes": out.getvalue(), "path": None}


def opened(
    folder: Path,
    labels: list[Any],
    pictures: list[Any] | None = None,
    feature: Any = None,
    task: Any = TASK,
    **settings: Any,
) -> LabeledRows:
    source = written(folder, "labeled", labels, pictures, feature)
    return open_labeled(Labeled(**source, **settings), 0, labels=task)


def written(
    folder: Path, name: str, labels: list[Any], pictures: list[Any] | None, feature: Any
) -> dict[str, Any]:
    features = Features({"image": datasets.Image(), "objects": feature or objects()})
    rows = {"image": pictures or [picture(100, 50)] * len(labels), "objects": labels}
    file = folder / f"{name}.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return {"path": "parquet", "data_files": str(file)}


def one(box: list[float], category: Any = 0) -> dict[str, Any]:
    return {"bbox": [box], "category": [category]}


TWO = {"bbox": [[10, 5, 20, 25], [50, 0, 50, 50]], "category": [1, 0]}
NONE: dict[str, Any] = {"bbox": [], "category": []}


def test_boxes_are_shares_of_their_pictures_and_padded(tmp_path: Path) -> None:
    rows = opened(
        tmp_path,
        [TWO, NONE, one([0, 0, 40, 10])],
        [
            picture(100, 50),
            picture(100, 50),
            picture(200, 20),
        ],
    )
    labels: Any = rows.labels
    assert rows.classes.names == ("red", "white")
    assert rows.class_numbers is None
    assert labels["there"].tolist() == [[True, True], [False, False], [True, False]]
    assert labels["classes"].tolist() == [[1, 0], [0, 0], [0, 0]]
    expected = np.zeros((3, 2, 4))
    expected[0] = [[0.1, 0.1, 0.3, 0.6], [0.5, 0, 1, 1]]
    expected[2, 0] = [0, 0, 0.2, 0.5]
    np.testing.assert_allclose(labels["boxes"], expected, rtol=1e-6)
    assert labels["size"].tolist() == [[50, 100], [50, 100], [20, 200]]
    assert {name: str(array.dtype) for name, array in labels.items()} == {
        "boxes": "float32",
        "classes": "int64",
        "there": "bool",
        "size": "float32",
    }
    assert "3 pictures, 1 of them without a box; boxes: 2 red, 1 white" in rows.notes[-1]


def test_a_turned_photograph_has_its_boxes_in_the_turned_picture(tmp_path: Path) -> None:
    """EXIF says that it is to be turned by 90 degrees: it is 40 wide then, and 80 high."""
    rows = opened(tmp_path, [one([0, 40, 20, 40])], [picture(80, 40, orientation=6)])
    labels: Any = rows.labels
    assert labels["size"].tolist() == [[80, 40]]
    np.testing.assert_allclose(labels["boxes"][0, 0], [0, 0.5, 0.5, 1])


@pytest.mark.parametrize("layout", ["lists", "structs", "numbers", "names"])
def test_every_layout_gives_the_same(tmp_path: Path, layout: str) -> None:
    box = List(Value("float32"), length=4)
    features = {
        "lists": objects(),
        "structs": List({"bbox": box, "category": CELLS}),
        "numbers": objects(Value("int64")),
        "names": objects(Value("string")),
    }
    labels: list[Any] = [TWO, NONE]
    if layout == "structs":
        pairs = zip(TWO["bbox"], TWO["category"], strict=True)
        labels = [[{"bbox": box, "category": number} for box, number in pairs], []]
    if layout == "names":
        labels = [{**TWO, "category": ["white", "red"]}, NONE]
    rows: Any = opened(tmp_path, labels, feature=features[layout])
    assert rows.labels["classes"].tolist() == [[1, 0], [0, 0]]
    assert rows.labels["there"].tolist() == [[True, True], [False, False]]


BAD = {
    "no area": (one([10, 10, 0, 5]), "has no area"),
    "negative": (one([10, 10, 5, -5]), "has no area"),
    "outside": (one([100, 10, 5, 5]), "lies outside its picture"),
    "before": (one([-9, 10, 9, 5]), "lies outside its picture"),
    "nan": (one([float("nan"), 10, 5, 5]), "is not four finite numbers"),
    "infinite": (one([0, 0, float("inf"), 5]), "is not four finite numbers"),
    "class": (one([0, 0, 5, 5], None), "has none of the 2 classes (red, white)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_box_is_refused_by_name_or_dropped(tmp_path: Path, case: str) -> None:
    bad, reason = BAD[case]
    labels = [TWO, bad, TWO]
    with pytest.raises(DataError) as caught:
        opened(tmp_path, labels)
    message = str(caught.value)
    assert reason in message
    assert "row 1" in message
    assert "box 0" in message
    assert "task.bad_boxes: drop" in message
    rows: Any = opened(tmp_path, labels, task=DROPPING)
    assert rows.labels["there"].tolist() == [[True, True], [False, False], [True, True]]
    assert any(f"1 that {reason}" in note and "row 1" in note for note in rows.notes)


def test_a_bad_box_of_a_row_that_is_not_used_does_not_matter(tmp_path: Path) -> None:
    rows = opened(tmp_path, [TWO, one([0, 0, 0, 0]), TWO], indices=[0, 2])
    assert rows.chosen == [0, 2]


def test_a_crowd_is_bad(tmp_path: Path) -> None:
    feature = {**objects(), "iscrowd": List(Value("int64"))}
    labels = [{**TWO, "iscrowd": [0, 1]}]
    with pytest.raises(DataError, match=r"box 1 .* stands for a crowd"):
        opened(tmp_path, labels, feature=feature)
    rows: Any = opened(tmp_path, labels, feature=feature, task=DROPPING)
    assert rows.labels["classes"].tolist() == [[1]]


def test_a_box_that_sticks_out_is_cut_and_counted(tmp_path: Path) -> None:
    rows: Any = opened(tmp_path, [one([-10, 40, 30, 40]), TWO])
    np.testing.assert_allclose(rows.labels["boxes"][0, 0], [0, 0.8, 0.2, 1])
    assert any("1 boxes stick out" in note for note in rows.notes)


def test_rows_are_chosen_by_the_seed_and_never_by_class(tmp_path: Path) -> None:
    labels = [TWO, NONE, one([1, 2, 3, 4]), TWO, NONE]
    first = opened(tmp_path, labels, rows=3).chosen
    assert first == opened(tmp_path, labels, rows=3).chosen
    assert len(first) == 3
    with pytest.raises(DataError, match="labels_per_class: goes by the class of a row"):
        opened(tmp_path, labels, labels_per_class=1)


def test_no_box_anywhere_needs_classes_that_are_declared(tmp_path: Path) -> None:
    rows: Any = opened(tmp_path, [NONE, NONE])
    assert rows.labels["boxes"].shape == (2, 1, 4)
    assert not rows.labels["there"].any()
    with pytest.raises(DataError, match="no object in any row"):
        opened(tmp_path, [NONE, NONE], feature=objects(Value("string")))


def test_rows_without_labels_are_null(tmp_path: Path) -> None:
    rows = opened(tmp_path, [TWO, None, NONE])
    assert rows.chosen == [0, 2]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1], CELLS, r"without bbox and category; task.name: detection needs objects"),
        ([{"bbox": [[1, 2, 3, 4]]}], {"bbox": objects()["bbox"]}, r"without category"),
        ([{"bbox": [[1, 2, 3, 4]], "category": [0, 1]}], None, r"row 0 .*1 boxes and 2 classes"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, labels: list[Any], feature: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, labels, feature=feature, label="objects")


def test_another_set_is_held_to_the_classes(tmp_path: Path) -> None:
    like = opened(tmp_path, [TWO])
    spec = input_spec(like)
    other = {**TWO, "category": ["white", "blue"]}
    config = LabelColumn(**written(tmp_path, "test", [other], None, objects(Value("string"))))
    with pytest.raises(DataError, match=r"data.test .*box 1 .*none of the 2 classes"):
        open_test(config, like, spec)
    unknown = {**TWO, "category": ["blue", "green"]}
    config = LabelColumn(**written(tmp_path, "test", [unknown], None, objects(Value("string"))))
    with pytest.raises(DataError, match="no class is in both"):
        open_test(config, like, spec)


def test_an_input_that_is_no_picture_has_no_places(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "objects": objects()})
    rows = {"text": ["a"], "objects": [TWO]}
    file = tmp_path / "text.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    from hpdist.data.kinds import kind_named

    config = Labeled(path="parquet", data_files=str(file))
    with pytest.raises(DataError, match="holds places in a picture, and the input is one of text"):
        open_labeled(config, 0, labels=TASK, kind=kind_named("text"))
