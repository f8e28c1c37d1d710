"""Rows of pixels and of sound as little pictures, one for each view: for a person's eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hpdist.data.decode.encoded import Array
from hpdist.data.structures import Structure

Cells: TypeAlias = list[list[Image.Image]]
"""Pictures of every row, one for each view."""

CELL = 112
"""Pixels of a picture's longer side, at most but for whole enlargements."""
_WIDE = 3 * CELL  # of a waveform


def pixel_cells(rows: Structure, views: Mapping[str, Structure]) -> Cells:
    """Show pixels; how views scale them shows in what the first view, `plain`, made of the rows."""
    x, shown = cast(Tensor, rows), _tensors(views)
    plain, original = shown[0].double().flatten(1), x.double().flatten(1)
    channels = x.shape[1]
    per_channel = [t.reshape(len(x), channels, -1).transpose(0, 1) for t in (plain, original)]
    scaled, pixels = (t.reshape(channels, -1) for t in per_channel)
    center, middle = scaled.mean(1, keepdim=True), pixels.mean(1, keepdim=True)
    variance = (scaled - center).square().sum(1, keepdim=True)
    slope = ((scaled - center) * (pixels - middle)).sum(1, keepdim=True) / variance.clamp(min=1e-12)
    slope, offset = (t.view(1, channels, 1, 1) for t in (slope, middle - slope * center))
    pixels_of = [(view.double() * slope + offset).round().clamp(0, 255).byte() for view in shown]
    return [[_picture(view[row]) for view in pixels_of] for row in range(len(x))]


def _picture(pixels: Tensor) -> Image.Image:
    values: Array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).convert("RGBA")
    under = Image.new("RGBA", image.size, "white")  # what is transparent
    return _fitted(Image.alpha_composite(under, image).convert("RGB"))


def _fitted(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side <= CELL:  # whole enlargements keep pixels what they are
        times = CELL // side
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    size = (max(image.width * CELL // side, 1), max(image.height * CELL // side, 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def audio_cells(views: Mapping[str, Structure]) -> Cells:
    """Show spectrograms, low frequencies at the bottom, or waveforms, of one scale in each row."""
    shown = _tensors(views)
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
    width = min(max(image.width, CELL), _WIDE)
    return image.convert("RGB").resize((width, CELL), Image.Resampling.BILINEAR)


def _waveform(values: Tensor, low: float, high: float) -> Image.Image:
    image = Image.new("RGB", (_WIDE, CELL), "white")
    pen = ImageDraw.Draw(image)
    samples = values[values.isfinite()]
    for at, part in enumerate(samples.tensor_split(_WIDE)):
        if len(part):
            ends = ((high - part.aminmax()[side]) / (high - low) * (CELL - 1) for side in (1, 0))
            top, bottom = map(float, ends)
            pen.line([(at, top), (at, bottom)], fill="black")
    return image


def _tensors(views: Mapping[str, Structure]) -> Sequence[Tensor]:
    return [cast(Tensor, view) for view in views.values()]
