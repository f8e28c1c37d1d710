"""Whole runs of `hpdist train` on pictures, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from hpdist import cli
from hpdist.train.data import RunData
from tests.support.pictures import ROWS, SCHEMA, picture

BATCH = 24
EPOCH = ROWS // BATCH  # steps


def write_config(
    folder: Path, files: Sequence[Path | str], rows: int = ROWS, **unlabeled: Any
) -> Path:
    """A config of two epochs of these files, which hold so many rows."""
    columns = {
        "image": [{"bytes": picture(1000 + row), "path": None} for row in range(10)],
        "label": [row % 5 for row in range(10)],
    }
    pq.write_table(pa.table(columns, SCHEMA), folder / "labeled.parquet")
    names = [str(file) for file in files]
    config = {
        "run": {"dir": str(folder / "runs")},
        "model": {"name": "mlp", "hidden": [8]},
        "data": {
            "labeled": {"path": "parquet", "data_files": str(folder / "labeled.parquet")},
            "unlabeled": {"path": "parquet", "data_files": names, "streaming": True}
            | {"audit": True, "shuffle_window": 1}
            | unlabeled,
        },
        "batch": {"labeled": 4, "unlabeled": BATCH},
        "algorithm": {"name": "fixmatch", "threshold": 0.2},
        "log": {"every": 1},
        "tracker": {"name": "none"},
        "steps": 2 * rows // BATCH,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, name: str, *overrides: str) -> tuple[int, list[str]]:
    """Run the command in this process: its exit status, and the errors that it tells."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before
    if "MASTER_PORT" in os.environ and not torch.distributed.is_initialized():
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the last is in use
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = cli.main(["train", str(config), f"--run.name={name}", *overrides])
    return status, [line for line in told.getvalue().splitlines() if line.startswith("hpdist: ")]


@contextlib.contextmanager
def at_batch(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something before a run takes its batch of this number."""
    real, taken = RunData.next, 0

    def following(self: RunData) -> Any:
        nonlocal taken
        if taken == number:
            act()
        taken += 1
        return real(self)

    RunData.next = following  # type: ignore[method-assign]
    try:
        yield
    finally:
        RunData.next = real  # type: ignore[method-assign]


def audit_of(run: Path) -> list[dict[str, Any]]:
    """What every rank wrote down, row by row."""
    parts = sorted((run / "audit").glob("rank-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def assert_once_an_epoch(run: Path, rows: int = ROWS, epochs: int = 2) -> None:
    """Every row stands in the audit exactly once in each epoch."""
    found = audit_of(run)
    for epoch in range(epochs):
        assert sorted(row["id"] for row in found if row["epoch"] == epoch) == list(range(rows))
    assert len(found) == rows * epochs


def records_of(run: Path, *keys: str) -> list[list[float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in keys] for line in lines]


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in (run / "checkpoints").iterdir())


def row_of(image: bytes) -> int:
    """Which row a picture is of."""
    pixels = Image.open(io.BytesIO(image)).tobytes()
    return pixels[0] * 256 + pixels[1]
