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

STEPS, LABELED, UNLABELED, CLASSES, PIXELS = 4, 8, 32, 5, 64


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
    after = crossing.given[start:]
    gradients = STEPS * crossing.parameters * (2 if options else 4)
    modules = trainer.step.engine.module.modules()
    channels = [layer.num_features for layer in modules if hasattr(layer, "num_features")]
    # Of batch normalisation: a count, and two sums of each channel in fp64, forward and backward.
    moments = STEPS * 2 * sum(8 * (2 * count + 1) for count in channels)
    result = {
        "found": crossing.found(crossing.seen | stored_windows()),
        "inputs": crossing.inputs,
        "sums": sum(len(raw) for name, raw in after if name == "allreduce_") - gradients - moments,
        "gathered": sum(len(raw) for name, raw in after if name == "allgather_"),
    }
    with crossing:  # what the search would have found: a row as it is stored, and a view of one
        planted = torch.from_numpy(np.asarray(Image.open(io.BytesIO(picture(3)))).copy())
        dist.all_reduce(planted)
        assert crossing.example is not None
        dist.all_gather_object([None, None], crossing.example.numpy())
    result["planted"] = crossing.found(crossing.seen | stored_windows())
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
        pytest.param("mixmatch", {}, marks=pytest.mark.slow),
    ],
)
def test_no_row_leaves_the_rank_that_read_it(
    folder: Path, algorithm: str, options: dict[str, Any]
) -> None:
    of_classes = STEPS * (LABELED + UNLABELED) * CLASSES * 4  # bytes of numbers of rows by classes
    of_rows = STEPS * (LABELED + UNLABELED) * PIXELS * 4
    for result in run_ranks(2, train, folder, algorithm, options):
        print(algorithm, options, {**result, "classes": of_classes, "rows": of_rows})
        assert result["inputs"] > 0
        assert result["found"] == []
        assert 0 < result["sums"] < of_classes
        assert result["sums"] + result["gathered"] < of_rows / 4
        assert [line.split()[0] for line in result["planted"]] == ["allreduce_", "allgather_"]
