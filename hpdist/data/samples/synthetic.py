"""Made-up tables as Parquet, the same every time: data for the case studies, without a download.

    python -m hpdist.data.samples.synthetic demo/tables

`clusters` has 784 features in one column `x`: two classes, each a Gaussian cloud around a centre of
its own, 4 standard deviations apart, so that the best classifier there is errs on 2.3 % of the
rows. A standard deviation is 1/8, which makes rows about 3.5 long: standardised ones are 28 long,
and there SGD at a rate of 0.1 diverges, one row at a time. `classification` is scikit-learn's
`make_classification`: ten features, a column for each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hpdist.data.samples.program import write_samples
from hpdist.errors import DataError

FEATURES = 784
_DISTANCE = 4.0  # standard deviations between the centres
_STD = 1 / 8
ROWS = {"labeled": 500, "unlabeled": 500, "test": 1000}
"""Rows of each file; the unlabelled one has no column of labels."""


def write_clusters(folder: str | Path) -> Path:
    """Write labeled, unlabeled and test.parquet of `clusters` into the folder, and return it.

    Columns `x` (784 numbers) and `label` (0 or 1, as many of each). Files are written anew. Raises
    DataError where that cannot be.
    """
    generator = np.random.default_rng(0)
    rows = sum(ROWS.values())
    direction = generator.normal(size=FEATURES)
    direction /= np.linalg.norm(direction)
    labels = np.arange(rows) % 2
    x = generator.normal(size=(rows, FEATURES))
    x += (labels[:, None] - 0.5) * _DISTANCE * direction
    return _write(Path(folder), {"x": (x * _STD).astype(np.float32)}, labels)


def write_classification(folder: str | Path) -> Path:
    """Write labeled, unlabeled and test.parquet of `classification`; see `write_clusters`.

    Columns `x0` to `x9` (a number each) and `label` (0 or 1).
    """
    try:
        from sklearn.datasets import make_classification  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "these rows are made by scikit-learn, which is not installed: pip install "
            "'hpdist[demo]'"
        ) from error
    x, labels = make_classification(sum(ROWS.values()), n_features=10, n_classes=2, random_state=0)
    columns = {f"x{k}": x[:, k].astype(np.float32) for k in range(10)}
    return _write(Path(folder), columns, labels)


def _write(folder: Path, columns: dict[str, Any], labels: np.ndarray[Any, Any]) -> Path:
    start = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in ROWS.items():
            part = {key: value[start : start + rows] for key, value in columns.items()}
            if name != "unlabeled":
                part["label"] = labels[start : start + rows]
            temporary = folder / f".{name}.{os.getpid()}"
            datasets.Dataset.from_dict(part).to_parquet(str(temporary))
            temporary.replace(folder / f"{name}.parquet")
            start += rows
    except OSError as error:
        raise DataError(f"cannot write the tables to {str(folder)!r}: {error}") from error
    return folder


def main(arguments: list[str]) -> int:
    """Write both tables into a folder."""
    return write_samples(
        "synthetic",
        arguments,
        lambda folder: write_clusters(Path(folder, "clusters")),
        lambda folder: write_classification(Path(folder, "classification")),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
