"""No row leaves the rank that read it in a training: what the process group was given is searched.

Mixed rows and outputs count too: algorithms mix within a rank, and some share outputs of rows.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import hpdist
from hpdist.models.cnn import CNN
from tests.support.crossing import Crossing, row_windows, windows
from tests.support.pictures import ROWS, picture, write_pictures
from tests.support.ranks import run_ranks

STEPS, LABELED, UNLABELED, CLASSES = 4, 8, 32, 5


def stored_windows() -> set[int]:
    """Windows of every row as it is stored and as it is decoded."""
    found: set[int] = set()
    for row in [*range(ROWS), *range(1000, 1040)]:
        stored = picture(row)
        pixels = np.asarray(Image.open(io.BytesIO(stored)))
        found |= windows(stored) | windows(pixels.tobytes())
        found |= row_windows(torch.from_numpy(pixels.astype(np.float32) / 255)[None, None])
    return found


def train(folder: Path, algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    held = {"path": "parquet", "data_files": str(folder / "labeled" / "train-00000.parquet")}
    with Crossing(CNN) as crossing:
        trainer = hpdist.Trainer(
            {"name": "cnn", "width": 4},
            {"name": algorithm},
            labeled=held,
            unlabeled={"path": str(folder / "rows"), "streaming": True},
            test=held,
            batch={"labeled": LABELED, "unlabeled": UNLABELED},
            run={"dir": str(folder / "runs"), "name": f"{algorithm}-{len(options)}"},
            tracker={"name": "none"},
            steps=STEPS,
            log={"every": 1},
            eval={"every": STEPS},
            **options,
        )
        start = len(crossing.given)
        trainer.fit()
    result = {
        "found": crossing.found(crossing.seen | stored_windows()),
        "inputs": crossing.inputs,
        "kinds": sorted(crossing.sizes()),
        "before": sum(len(raw) for _, raw in crossing.given[:start]),
        "all": sum(len(raw) for _, raw in crossing.given),
        "sums": sum(len(raw) for name, raw in crossing.given[start:] if name == "allreduce_"),
    }
    with crossing:  # what the search would have found
        planted = torch.from_numpy(np.asarray(Image.open(io.BytesIO(picture(3)))).copy())
        dist.broadcast(planted, 0)
    result["planted"] = crossing.found(stored_windows())
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stay")
    write_pictures(folder / "rows")
    write_pictures(folder / "labeled", [[40]], values={r: picture(1000 + r) for r in range(40)})
    return folder


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("fixmatch", {}),
        ("fixmatch", {"zero": {"stage": 2}, "precision": "bf16"}),
        ("mixmatch", {}),
    ],
)
def test_no_row_leaves_the_rank_that_read_it(
    folder: Path, algorithm: str, options: dict[str, Any]
) -> None:
    for result in run_ranks(2, train, folder, algorithm, options):
        print(algorithm, options, result)
        assert result["inputs"] > 0
        assert result["found"] == []
        assert result["planted"] == ["broadcast_"]
