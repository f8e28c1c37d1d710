"""Empty, wrongly shaped and null rows of every modality: counted, skipped and named by a run."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpdist.errors import DataError
from hpdist.train.trainer import Trainer
from tests.support.texts import SENTENCES, write_model

ROWS, GROUP = 24, 5
PLACES = (3, 11, 19, 22)


def picture(number: int, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def vector(number: int) -> list[float]:
    return [float(number), math.sin(number), 1.0]


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "image": (
        lambda row: {"x": picture(row)},
        [
            {"x": {"bytes": b"", "path": None}},
            {"x": picture(1, (8, 9))},
            {"x": None},
            {"x": {"bytes": picture(0)["bytes"][:50], "path": None}},
        ],
        [
            "not an image that Pillow knows",
            "its shape is 3x8x9, the first labelled row's is 3x8x8",
            "the value is null",
            "image file is truncated",
        ],
    ),
    "vector": (
        lambda row: {"x": vector(row)},
        [{"x": []}, {"x": [1.0, 2.0]}, {"x": None}, {"x": [1.0, math.nan, 1.0]}],
        [
            "its shape is 0",
            "its shape is 2, the first labelled row's is 3",
            "null",
            "holds NaN or infinity",
        ],
    ),
    "columns": (
        lambda row: dict(zip("abc", vector(row), strict=True)),
        [
            {"a": None, "b": None, "c": None},
            {"a": 1.0, "b": None, "c": 1.0},
            {"a": 1.0, "b": 1.0, "c": math.nan},
            {"a": math.inf, "b": 1.0, "c": 1.0},
        ],
        ["", "'b'", "'c'", "'a'"],
    ),
    "text": (
        lambda row: {"x": SENTENCES[row % len(SENTENCES)]},
        [{"x": ""}, {"x": " \n "}, {"x": None}, {"x": "\u0000"}],
        ["its text is empty", "its text is empty", "the value is null", "finds no token"],
    ),
}


def write(path: Path, rows: list[dict[str, Any]], labels: bool) -> str:
    if labels:
        rows = [{**row, "label": number % 2} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=GROUP)
    return str(path)


def trainer(folder: Path, kind: str, streaming: bool, most: int) -> Trainer:
    make, bad, _ = KINDS[kind]
    rows = [make(row) for row in range(ROWS)]
    for place, row in zip(PLACES, bad, strict=True):
        rows[place] = row
    column: dict[str, Any] = {"input": ["a", "b", "c"] if kind == "columns" else "x"}
    data = {
        "labeled": write(folder / "labeled.parquet", [make(row) for row in range(4)], True),
        "unlabeled": write(folder / "unlabeled.parquet", rows, False),
    }
    source = {name: {"path": "parquet", "data_files": path} for name, path in data.items()}
    model: dict[str, Any] = {"name": "mlp", "hidden": [8]}
    views: dict[str, Any] = {"name": "table"}
    if kind == "image":
        model, views = {"name": "wide_resnet", "depth": 10, "width": 1}, {"name": "image"}
    if kind == "text":
        write_model(folder / "bert")
        model = {"name": f"hf:{folder / 'bert'}", "pretrained": False}
        views = {"name": "text", "max_length": 16}
    return Trainer(
        model,
        {"name": "fixmatch", "threshold": 0.0},
        labeled=source["labeled"] | column,
        unlabeled=source["unlabeled"] | column | {"streaming": streaming, "max_bad_rows": most},
        views=views,
        batch={"labeled": 2, "unlabeled": 8},
        steps=ROWS // 8,  # one epoch
        run={"dir": str(folder), "name": f"run-{streaming}-{most}"},
        tracker={"name": "none"},
    )


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_counted_skipped_and_named(
    tmp_path: Path, kind: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hpdist.data"):
        summary = trainer(tmp_path, kind, streaming, len(PLACES)).fit()
    assert summary["bad_rows"] == len(PLACES)
    lines = [line for line in caplog.messages if "an unlabelled row is left out" in line]
    assert len(lines) == len(PLACES)
    for place, reason in zip(PLACES, KINDS[kind][2], strict=True):
        path = tmp_path / "unlabeled.parquet"
        where = f"row {place} ({path}, row {place})"
        if streaming:
            where = f"{path}, row group {place // GROUP}, row {place % GROUP}"
        (line,) = [line for line in lines if f": {where}: " in line]
        assert reason in line


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_row_more_than_may_be_ends_the_run(tmp_path: Path, kind: str) -> None:
    message = r"max_bad_rows: [34] rows of epoch 0 could not be used, and 2 are allowed; .*row"
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, kind, True, 2).fit()
