"""Whole runs of a few steps in this process, and what they leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from hpdist.train.trainer import Trainer
from tests.support.parquet_files import write_numbers


class Breaks(nn.Module):
    """A linear model whose evaluation can be made to fail on a rank."""

    broken: int | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training and str(Breaks.broken) == os.environ.get("RANK", "0"):
            raise RuntimeError("out of luck")
        logits: Tensor = self.layer(inputs / 50)
        return logits


def held_out(*values: Any) -> Any:
    """A set to measure on; a row that is None cannot be decoded."""
    rows = [[float(v), 1.0] if v is not None else None for v in values]
    labels = [0, 1, 2, 1, 2, 0, 2, 1][: len(rows)]
    numbers = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"x": numbers, "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"x": rows, "label": labels}, features=features)


def trainer(folder: Path, steps: int, name: str = "run", **settings: Any) -> Trainer:
    data = folder / "data"
    if not data.exists():
        write_numbers(data, [[30]])
    files = {"path": "parquet", "data_files": str(data / "*.parquet"), "input": "x"}
    held = {key: settings.pop(key) for key in ("test", "validation") if key in settings}
    defaults: dict[str, Any] = {
        "labeled": {**files, "rows": 12},
        "optim": {"lr": 0.001},
        "batch": {"labeled": 4, "unlabeled": 8},
        "checkpoint": {"every": 2},
        "schedule": {"name": "constant"},
    }
    return Trainer(
        settings.pop("model", None) or Breaks(),
        {"name": "fixmatch", "threshold": 0.2},
        unlabeled=files,
        views={"name": "identity"},
        run=settings.pop("run", {"dir": str(folder), "name": name}),
        log={"every": 1},
        tracker={"name": "none"},
        steps=steps,
        **{key: (value, {"input": "x"}) for key, value in held.items()},
        **(defaults | settings),
    )


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def counted(training: Trainer) -> list[int]:
    """Train; the steps that were saved."""
    steps: list[int] = []
    assert training.writer is not None
    save = training.writer.save

    def counting(step: int, *rest: Any, **more: Any) -> None:
        steps.append(step)
        save(step, *rest, **more)

    training.writer.save = counting  # type: ignore[method-assign]
    training.fit()
    return steps


@contextmanager
def broken(rank: int | None = 0) -> Iterator[None]:
    """Have evaluations fail on a rank, of models that are there already."""
    Breaks.broken = rank
    try:
        yield
    finally:
        Breaks.broken = None
