"""Drawn shapes with their boxes as Parquet, the same every time: objects to find, no download.

    python -m hpdist.data.samples.shapes demo/shapes

A picture has up to four discs, squares and crosses of any colour on a noisy background; some have
none. Columns `image` (PNG) and `objects` ({bbox, category}), as object detection takes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from hpdist.data.samples.program import write_samples
from hpdist.errors import DataError

NAMES = ("disc", "square", "cross")
ROWS: Mapping[str, int] = {"labeled": 16, "unlabeled": 200, "test": 64}
"""Rows of each file; the unlabelled one has no column of objects."""
SIZE = 64
_MOST = 4  # shapes of a picture


def write_shapes(
    folder: str | Path, rows: Mapping[str, int] = ROWS, size: int = SIZE, seed: int = 0
) -> Path:
    """Write labeled, unlabeled and test.parquet into the folder, and return it.

    Files are written anew. Raises DataError where that cannot be.
    """
    folder = Path(folder)
    generator = np.random.default_rng(seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, count in rows.items():
            drawn = [draw_shapes(generator, size) for _ in range(count)]
            columns: dict[str, Any] = {"image": [picture for picture, _ in drawn]}
            if name != "unlabeled":
                columns["objects"] = [objects for _, objects in drawn]
            features = datasets.Features({key: FEATURES[key] for key in columns})
            temporary = folder / f".{name}.{os.getpid()}"
            datasets.Dataset.from_dict(columns, features=features).to_parquet(str(temporary))
            temporary.replace(folder / f"{name}.parquet")
    except OSError as error:
        raise DataError(f"cannot write the shapes to {str(folder)!r}: {error}") from error
    return folder


FEATURES: Mapping[str, Any] = {
    "image": datasets.Image(),
    "objects": {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(NAMES))),
    },
}


def draw_shapes(generator: np.random.Generator, size: int) -> tuple[Image.Image, dict[str, Any]]:
    """Draw one picture of size x size pixels; also its boxes x, y, width, height and classes."""
    noise = generator.integers(90, 150, (size, size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    draw = ImageDraw.Draw(picture)
    objects: dict[str, Any] = {"bbox": [], "category": []}
    for _ in range(int(generator.integers(0, _MOST + 1))):
        side = int(generator.integers(size // 6, size // 3))
        x, y = (int(place) for place in generator.integers(0, size - side, 2))
        category = int(generator.integers(len(NAMES)))
        colour = _colour(generator)
        _draw(draw, NAMES[category], (x, y, x + side - 1, y + side - 1), colour)
        objects["bbox"].append([float(x), float(y), float(side), float(side)])
        objects["category"].append(category)
    return picture, objects


def _colour(generator: np.random.Generator) -> tuple[int, int, int]:
    """Draw a colour that is darker or lighter than the background in every channel."""
    levels = generator.integers(0, 70, 3) + 185 * generator.integers(0, 2, 3)
    red, green, blue = (int(level) for level in levels)
    return red, green, blue


def _draw(
    draw: ImageDraw.ImageDraw,
    name: str,
    ends: tuple[int, int, int, int],
    colour: tuple[int, int, int],
) -> None:
    """Draw a shape that touches all four sides of its box, whose last pixels are in `ends`."""
    x0, y0, x1, y1 = ends
    if name == "disc":
        draw.ellipse(ends, fill=colour)
    elif name == "square":
        draw.rectangle(ends, fill=colour)
    else:
        third = (x1 - x0 + 1) // 3
        draw.rectangle((x0 + third, y0, x1 - third, y1), fill=colour)
        draw.rectangle((x0, y0 + third, x1, y1 - third), fill=colour)


def main(arguments: list[str]) -> int:
    """Write the shapes into a folder."""
    return write_samples("shapes", arguments, write_shapes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
