"""Examples of a run's views of its first rows: `examples/views.png`, or `views.txt`.

Images and audio (as spectrograms or waveforms) become a sheet of rows by views, text and vectors
lines of text. The views are those of the first step: noise depends on position, not on calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.encoded import Array
from hpdist.data.decode.stored_values import InputSpec
from hpdist.data.views.base import Views

FOLDER = "examples"
NAMES = ("original", "weak", "strong")
_CELL = 112  # pixels of a picture's longer side; small ones are enlarged by whole factors
_GAP, _TITLE = 6, 16  # pixels
_WIDE = 3 * _CELL  # of a waveform
_FEATURES = 30  # of a vector


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
    x = batch.inputs[kept].cpu()
    stream = "unlabeled" if isinstance(batch, UnlabeledBatch) else "labeled"
    where: dict[str, Any] = {"stream": stream, "step": step, "positions": kept}
    with _own_random_state(), torch.no_grad():
        shown = [views.plain(x.clone())]
        shown += [view(x.clone(), **where) for view in (views.weak, views.strong)]
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if spec.kind in ("image", "audio"):
        file = folder / FOLDER / "views.png"
        cells = _images(x, shown) if spec.kind == "image" else _waveforms(shown)
        _sheet(cells).save(file)
        return file
    file = folder / FOLDER / "views.txt"
    lines = _texts(shown, spec) if spec.kind == "text" else _table(x, shown, spec)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


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


def _images(x: Tensor, shown: Sequence[Tensor]) -> list[list[Image.Image]]:
    """Pixels of every row and view; the views' scaling is estimated from `plain` of the rows."""
    plain, original = shown[0].double().flatten(1), x.double().flatten(1)
    channels = x.shape[1]
    per_channel = [t.reshape(len(x), channels, -1).transpose(0, 1) for t in (plain, original)]
    scaled, pixels = (t.reshape(channels, -1) for t in per_channel)
    center, middle = scaled.mean(1, keepdim=True), pixels.mean(1, keepdim=True)
    variance = (scaled - center).square().sum(1, keepdim=True)
    slope = ((scaled - center) * (pixels - middle)).sum(1, keepdim=True) / variance.clamp(min=1e-12)
    slope, offset = (t.view(1, channels, 1, 1) for t in (slope, middle - slope * center))
    views = [(view.double() * slope + offset).round().clamp(0, 255).byte() for view in shown]
    return [[_picture(view[row]) for view in views] for row in range(len(x))]


def _picture(pixels: Tensor) -> Image.Image:
    values: Array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).convert("RGBA")
    under = Image.new("RGBA", image.size, "white")  # under transparent pixels
    return _fitted(Image.alpha_composite(under, image).convert("RGB"))


def _fitted(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side <= _CELL:  # enlarging by whole factors keeps pixels sharp
        times = _CELL // side
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    size = (max(image.width * _CELL // side, 1), max(image.height * _CELL // side, 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def _waveforms(shown: Sequence[Tensor]) -> list[list[Image.Image]]:
    """Spectrograms, low frequencies at the bottom, or waveforms, at one scale per row."""
    cells = []
    for row in range(len(shown[0])):
        values = [view[row].double().squeeze(0) for view in shown]
        finite = torch.cat([v[v.isfinite()] for v in values])
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        draw = _spectrogram if values[0].dim() == 2 else _waveform
        cells.append([draw(v, low, max(high, low + 1e-9)) for v in values])
    return cells


def _spectrogram(values: Tensor, low: float, high: float) -> Image.Image:
    level = ((values.nan_to_num(low) - low) / (high - low) * 255).round().clamp(0, 255).byte()
    image = Image.fromarray(level.flip(0).numpy())
    width = min(max(image.width, _CELL), _WIDE)
    return image.convert("RGB").resize((width, _CELL), Image.Resampling.BILINEAR)


def _waveform(values: Tensor, low: float, high: float) -> Image.Image:
    image = Image.new("RGB", (_WIDE, _CELL), "white")
    pen = ImageDraw.Draw(image)
    samples = values[values.isfinite()]
    for at, part in enumerate(samples.tensor_split(_WIDE)):
        if len(part):
            ends = ((high - part.aminmax()[side]) / (high - low) * (_CELL - 1) for side in (1, 0))
            top, bottom = map(float, ends)
            pen.line([(at, top), (at, bottom)], fill="black")
    return image


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


def _texts(shown: Sequence[Tensor], spec: InputSpec) -> list[str]:
    assert spec.tokenizer is not None
    lines = []
    for row in range(len(shown[0])):
        for name, view in zip(NAMES, shown, strict=True):
            text = spec.tokenizer.decode(view[row].flatten().long().tolist())
            lines.append(f"{name:9} {text}")
        lines.append("")
    return lines[:-1]


def _table(x: Tensor, shown: Sequence[Tensor], spec: InputSpec) -> list[str]:
    """A line for each feature: the stored values, and those of the views."""
    rows = [x.double(), *(view.double() for view in shown[1:])]
    names = spec.names or [str(number) for number in range(x.shape[1])]
    width = max(map(len, [*names[:_FEATURES], "feature"]))
    lines = []
    for row in range(len(x)):
        lines.append(f"{'feature':{width}} " + "".join(f"{name:>12}" for name in NAMES))
        for feature, name in enumerate(names[:_FEATURES]):
            values = "".join(f"{view[row, feature].item():12.5g}" for view in rows)
            lines.append(f"{name:{width}} {values}")
        lines.append("")
    left_out = len(names) - _FEATURES
    return [*lines[:-1], f"and {left_out} more features"] if left_out > 0 else lines[:-1]
