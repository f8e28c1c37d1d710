"""Predicts real Parquet files with a trained model, and dies by SIGKILL in the middle of it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch

import hpdist
from hpdist.data.config import Unlabeled
from hpdist.evaluate.predict import Predicted, PredictOptions, parts, plan, predict_to
from hpdist.evaluate.predictor import Predictor
from tests.support.forked import run_forked

GROUPS = [[17, 9], [14, 31], [50]]
ROWS = 121
OPTIONS: dict[str, Any] = {"probabilities": True, "batch": 5, "part_rows": 12}
_POINTS = [
    (plan, "write_whole"),
    (os, "replace"),
    (os, "fsync"),
    (parts, "by_length"),
    (Predictor, "outputs"),
]


def make_run(folder: Path) -> Path:
    """Train a small model on numbers; the run folder. The data lie beside it."""
    files = _write(folder / "data")
    data = {"path": "parquet", "data_files": [str(file) for file in files], "input": "x"}
    hpdist.Trainer(
        {"name": "mlp", "hidden": [8]},
        {"name": "supervised"},
        labeled={**data, "rows": 60},
        views={"name": "identity"},
        batch={"labeled": 12},
        optim={"lr": 0.3},
        run={"dir": str(folder), "name": "run"},
        tracker={"name": "none"},
        steps=40,
    ).fit()
    return folder / "run"


def vectors() -> np.ndarray:
    """The inputs of all rows, fp32 [rows, 2]."""
    row = np.arange(ROWS)
    return np.stack([np.sin(row), np.cos(2 * row)], axis=1).astype(np.float32)


def _write(folder: Path) -> list[Path]:
    """Write one file per entry of `GROUPS`, of row groups of these sizes."""
    folder.mkdir()
    x = vectors()
    labels = np.where(x[:, 0] > 0.3, 0, np.where(x[:, 1] > 0, 1, 2))
    paths, at = [], 0
    schema = pa.schema({"x": pa.list_(pa.float32()), "label": pa.int64()})
    for number, sizes in enumerate(GROUPS):
        paths.append(folder / f"train-{number:05d}.parquet")
        with pq.ParquetWriter(paths[-1], schema) as writer:
            for size in sizes:
                part = slice(at, at + size)
                columns = {"x": x[part].tolist(), "label": labels[part].tolist()}
                writer.write_table(pa.table(columns, schema=schema))
                at += size
    return paths


def predict(folder: Path, out: str, **changes: Any) -> Predicted | None:
    """Predict as one of the launched ranks, or alone."""
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        from accelerate import PartialState

        PartialState()
    return predict_to(
        hpdist.load(folder / "run"),
        Unlabeled(path=str(folder / "data")),
        folder / out,
        PredictOptions(**OPTIONS | changes),
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size,
    )


def _killed(folder: Path, out: str, victim: int, point: int) -> None:
    """Predict; rank `victim` dies before its `point`-th step of it."""
    passed = [0]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            passed[0] += 1
            if passed[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    if os.environ["RANK"] == str(victim):
        from hpdist.evaluate.predict import run

        for owner, name in _POINTS:
            original = getattr(owner, name)
            made = wrapped(original)
            setattr(owner, name, made)
            if getattr(run, name, None) is original:  # where it was imported
                setattr(run, name, made)
    predict(folder, out)


def _killed_after(folder: Path, out: str, victim: int, seconds: float) -> None:
    """Predict; rank `victim` dies so many seconds after it has begun."""
    if os.environ["RANK"] == str(victim):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    predict(folder, out)


def _timed(folder: Path, out: str) -> None:
    start = time.monotonic()
    predict(folder, out)
    (folder / f"seconds-{os.environ['RANK']}").write_text(str(time.monotonic() - start))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of predictions."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_and_resume(folder: Path, points: list[int]) -> list[dict[str, Any]]:
    """Kill either of two ranks at these points, go on with three and with one; what came of it."""
    whole = _whole_contents(folder)
    found = []
    for number, point in enumerate(points):
        victim, ranks = number % 2, (3, 1)[number // 2 % 2]
        name = f"killed-{point}-{victim}"
        ended = run_forked(2, folder / f"{name}.log", _killed, folder, name, victim, point)
        killed = ended[victim] == -signal.SIGKILL
        found.append({"killed": killed} | _gone_on(folder, name, ranks, whole))
    return found


def kill_at_random(folder: Path, kills: int) -> list[dict[str, Any]]:
    """Kill either of two ranks so many times at random instants, go on with three and with one."""
    log, draw = folder / "timed.log", random.Random(0)
    whole = _whole_contents(folder)
    assert run_forked(2, log, _timed, folder, "timed") == [0, 0], log.read_text()[-5000:]
    seconds = [float((folder / f"seconds-{rank}").read_text()) for rank in range(2)]
    found: list[dict[str, Any]] = []
    for attempt in range(4 * kills):
        victim, name = attempt % 2, f"random-{attempt}"
        ranks = (3, 1)[len(found) // 2 % 2]
        after = draw.uniform(0, seconds[victim])
        log = folder / f"{name}.log"
        ended = run_forked(2, log, _killed_after, folder, name, victim, after)
        if ended[victim] != -signal.SIGKILL:  # it was done before
            continue
        found.append({"after": after} | _gone_on(folder, name, ranks, whole))
        if len(found) == kills:
            break
    return found


def unequal(results: list[dict[str, Any]]) -> str:
    """Say of each start that went on how it failed, or which files it left other; or nothing."""
    lines = []
    for result in results:
        if any(result["resumed"]):
            lines.append(f"{result['name']}: {result['resumed']} when it went on:{result['said']}")
        elif result["differing"]:
            lines.append(f"{result['name']}: went on, and differs in {result['differing']}")
    return "\n".join(lines)


def _gone_on(folder: Path, name: str, ranks: int, whole: dict[str, bytes]) -> dict[str, Any]:
    """Go on with predictions; how many parts there were, how ranks ended, and what differs."""
    parts = sum(1 for _ in (folder / name).glob("part-*.parquet"))
    log = folder / f"{name}-resumed.log"
    resumed = run_forked(ranks, log, predict, folder, name)
    found = contents(folder / name)
    differing = [file for file in sorted({*found, *whole}) if found.get(file) != whole.get(file)]
    return {
        "name": name,
        "parts": parts,
        "ranks": ranks,
        "resumed": resumed,
        "said": log.read_text()[-3000:],
        "differing": differing,
    }


def _whole_contents(folder: Path) -> dict[str, bytes]:
    """Train, and predict without being killed; what the folder then holds."""
    log = folder / "whole.log"
    assert run_forked(1, log, _whole, folder) == [0], log.read_text()[-5000:]
    return contents(folder / "whole")


def _whole(folder: Path) -> None:
    make_run(folder)
    predict(folder, "whole")
