"""Scikit-learn's handwritten digits as Parquet: real data for the demo, without a download."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hpdist.data.samples.program import write_samples
from hpdist.errors import DataError

TEST_ROWS = 360
TRAIN_SHARDS = 4
_TEST_FILE = "test-00000-of-00001.parquet"
_TRAIN_FILES = [f"train-{k:05d}-of-{TRAIN_SHARDS:05d}.parquet" for k in range(TRAIN_SHARDS)]


def write_digits(folder: str | Path) -> Path:
    """Write the 1,797 scans (8x8, grey) with their labels, once, and return the folder.

    Columns `image` (PNG) and `label` (ten classes); 1,437 rows in four train shards and a
    stratified test split of 360. A folder that is complete stays as it is; a killed call leaves no
    file half written. Raises DataError when scikit-learn is not installed or the folder cannot be
    written.
    """
    folder = Path(folder)
    files = [folder / name for name in (*_TRAIN_FILES, _TEST_FILE)]
    if all(file.exists() for file in files):
        return folder
    images, labels, test = _load_split()  # uint8 [rows, 8, 8], int64 [rows], bool [rows]
    parts = [*np.array_split(np.flatnonzero(~test), TRAIN_SHARDS), np.flatnonzero(test)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            _write(images[part], labels[part], file)
    except OSError as error:
        raise DataError(f"cannot write the digits to {str(folder)!r}: {error}") from error
    return folder


def _load_split() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Load images, labels and which rows are for the test; the same split every time."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'hpdist[demo]'"
        ) from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    rows = np.arange(len(images))
    _, held_out = train_test_split(
        rows, test_size=TEST_ROWS, stratify=digits.target, random_state=0
    )
    return images, digits.target, np.isin(rows, held_out)


def _write(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], file: Path) -> None:
    """Write one Parquet file under a temporary name, then rename it."""
    features = datasets.Features(
        {
            "image": datasets.Image(mode="L"),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )
    columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            datasets.Dataset.from_dict(columns, features=features).to_parquet(stream)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Write the digits into a folder."""
    return write_samples("digits", arguments, write_digits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
