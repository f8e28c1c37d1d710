"""Examples of a run's views of its first rows: `examples/views.png`, or `views.txt`.

Rows that can be shown as pictures, as images and audio can, become a sheet of rows by views, all
others lines of text. The views are those of the first step: noise depends on position, not on
calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from PIL import Image, ImageDraw

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import kind_named
from hpdist.data.kinds.drawing import Cells
from hpdist.data.structures import Structure, index, map_tensors, to
from hpdist.data.views.base import Views

FOLDER = "examples"
NAMES = ("original", "weak", "strong")
_GAP, _TITLE = 6, 16  # pixels


def write_examples(
    folder: Path,
    views: Views,
    spec: InputSpec,
    batch: LabeledBatch | UnlabeledBatch,
    rows: int,
    step: int,
) -> Path | None:
    """Write views of the first usable rows of a batch to a run folder; None if there are none.

    No random state of the training is changed.
    """
    valid = getattr(batch, "valid", None)
    kept = torch.arange(len(batch)) if valid is None else valid.nonzero()[:, 0]
    kept = kept[:rows]
    if not len(kept):
        return None
    rows_shown: Structure = to(index(batch.inputs, kept), "cpu")
    stream = "unlabeled" if isinstance(batch, UnlabeledBatch) else "labeled"
    where: dict[str, Any] = {"stream": stream, "step": step, "positions": kept}
    with _own_random_state(), torch.no_grad():
        shown = [views.plain(_copied(rows_shown))]
        shown += [view(_copied(rows_shown), **where) for view in (views.weak, views.strong)]
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    drawn = kind_named(spec.kind).draw(spec, rows_shown, dict(zip(NAMES, shown, strict=True)))
    if _are_lines(drawn):
        file = folder / FOLDER / "views.txt"
        file.write_text("\n".join(drawn) + "\n", encoding="utf-8")
        return file
    file = folder / FOLDER / "views.png"
    _sheet(cast(Cells, drawn)).save(file)
    return file


def _are_lines(drawn: Cells | list[str]) -> TypeGuard[list[str]]:
    return isinstance(drawn[0], str)


def _copied(rows: Structure) -> Structure:
    return map_tensors(lambda tensor: tensor.clone(), rows)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Restore the random generators afterwards, for user-defined views that draw from them."""
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def _sheet(cells: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange pictures in rows and columns, under the names of the views."""
    width = max(cell.width for row in cells for cell in row) + _GAP
    height = max(cell.height for row in cells for cell in row) + _GAP
    sheet = Image.new("RGB", (width * len(NAMES), height * len(cells) + _TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(NAMES):
        pen.text((column * width + _GAP // 2, 2), name, fill="black")
        for line, row in enumerate(cells):
            sheet.paste(row[column], (column * width + _GAP // 2, line * height + _TITLE))
    return sheet
