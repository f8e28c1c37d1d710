"""Drawn shapes: boxes are tight around the pixels that were drawn, and rows are the same again."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from hpdist.data.samples import shapes
from hpdist.errors import DataError


def test_a_box_is_tight_around_its_shape() -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        picture, objects = shapes.draw_shapes(generator, 48)
        pixels = np.asarray(picture)
        drawn = ((pixels < 70) | (pixels >= 185)).all(axis=2)
        if not objects["bbox"]:
            assert not drawn.any()
        if len(objects["bbox"]) != 1:
            continue
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        x, y, width, height = objects["bbox"][0]
        assert (columns[0], columns[-1] + 1) == (x, x + width)
        assert (rows[0], rows[-1] + 1) == (y, y + height)
        seen.add(objects["category"][0])
    assert seen == {0, 1, 2}


def test_files_are_the_same_again_and_the_unlabelled_one_has_no_boxes(tmp_path: Path) -> None:
    rows = {"labeled": 3, "unlabeled": 2}
    for name in ("one", "two"):
        shapes.write_shapes(tmp_path / name, rows, size=32)
    for part, count in rows.items():
        one, two = ((tmp_path / name / f"{part}.parquet") for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        table = datasets.Dataset.from_parquet(str(one))
        assert table.num_rows == count
        assert ("objects" in table.column_names) == (part == "labeled")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the shapes to"):
        shapes.write_shapes(tmp_path / "file" / "below", {"labeled": 1})
