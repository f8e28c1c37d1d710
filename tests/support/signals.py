"""Series of numbers of unequal length, of two classes that differ in how far they spread."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np

ROWS = {"labeled": 16, "unlabeled": 90, "test": 21}


def write_signals(folder: Path) -> Path:
    """Write the three sets as Parquet files; give the folder back."""
    folder.mkdir()
    for seed, (name, rows) in enumerate(ROWS.items()):
        drawn = np.random.default_rng(seed)
        labels = [row % 2 for row in range(rows)]
        signals = [
            drawn.normal(0, 1 + 3 * label, drawn.integers(3, 12)).astype(np.float32).tolist()
            for label in labels
        ]
        columns = {"signal": signals} | ({} if name == "unlabeled" else {"label": labels})
        table = datasets.Dataset.from_dict(columns)
        table.to_parquet(str(folder / f"{name}.parquet"), batch_size=8)
    return folder
