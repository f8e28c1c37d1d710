"""Models whose parameters meet every fate, and rows in memory to train them on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 3


def rows(count: int = 40) -> datasets.Dataset:
    """A table of three classes that are easily told apart."""
    draw = np.random.default_rng(1)
    labels = np.arange(count) % CLASSES
    values = draw.normal(size=(count, 4)) * 0.1
    values[:, 0] += labels
    return datasets.Dataset.from_dict(
        {name: values[:, k] for k, name in enumerate("abcd")} | {"label": labels}
    )


ROWS = (rows(), {"input": ["a", "b", "c", "d"]})


class Small(nn.Module):
    """Two layers; the base of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, CLASSES)

    def features(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs).relu()
        return hidden

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.features(inputs))


class Odd(Small):
    """Parameters that are never, now and then or always trained; without dimensions or elements."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Linear(8, 8)
        self.dead_scalar = nn.Parameter(torch.tensor(3.0))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(3, 0))
        self.dead_empty = nn.Parameter(torch.zeros(0))
        self.now_and_then = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.whole_numbers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def features(self, inputs: Tensor) -> Tensor:
        hidden = super().features(inputs)
        hidden = hidden + self.tied_too(self.tied(self.frozen(hidden)).relu())
        if self.training and torch.is_grad_enabled():
            self.passes += 1  # of the student
        if self.passes % 2 == 0:
            hidden = hidden + self.now_and_then(hidden)
        return hidden * self.temperature + self.empty.sum()


class ByRank(Small):
    """A layer that only the first rank's loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.of_first = nn.Linear(8, 8)

    def features(self, inputs: Tensor) -> Tensor:
        hidden = super().features(inputs)
        return hidden + self.of_first(hidden) if os.environ.get("RANK", "0") == "0" else hidden


class Leaving(Small):
    """A layer that only the first step's loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(8, 8)
        self.passes = 0

    def features(self, inputs: Tensor) -> Tensor:
        hidden = super().features(inputs)
        if self.training and torch.is_grad_enabled():
            self.passes += 1
        return hidden + self.early(hidden) if self.passes <= 1 else hidden


class Alternating(Small):
    """A layer that every other pass reaches: of two micro-batches the first."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(8, 8)
        self.passes = 0

    def features(self, inputs: Tensor) -> Tensor:
        hidden = super().features(inputs)
        if self.training and torch.is_grad_enabled():
            self.passes += 1
        return hidden + self.odd(hidden) if self.passes % 2 else hidden


class Unreached(Small):
    """A layer that no loss reaches, and a scalar that all do."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(inputs) * self.temperature


class Complex(Small):
    """Complex weights in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.full((8,), 1 + 0.5j))

    def features(self, inputs: Tensor) -> Tensor:
        return (super().features(inputs) * self.phase).abs()


class Reentrant(Small):
    """Its first layers are recomputed in the old way, which gives them no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))

    def features(self, inputs: Tensor) -> Tensor:
        recomputed: Any = checkpoint
        return super().features(recomputed(self.front, inputs, use_reentrant=True))


def trainer(model: Any, folder: Path, name: str, steps: int, **settings: Any) -> Any:
    """A trainer whose run saves every step; the same name continues it."""
    from hpdist import Trainer

    values: dict[str, Any] = {
        "algorithm": "fixmatch",
        "labeled": ROWS,
        "unlabeled": ROWS,
        "views": {"name": "table"},
        "batch": {"labeled": 4, "unlabeled": 8},
        "schedule": {"name": "constant"},
        "run": {"dir": str(folder), "name": name},
        "log": {"every": 1},
        "checkpoint": {"every": 1, "keep": 10, "background": False},
        "tracker": {"name": "none"},
    }
    return Trainer(model, steps=steps, **(values | settings))


def train(kind: type[nn.Module], folder: Path, name: str, steps: int, **settings: Any) -> Any:
    """Train a model of a kind from the same weights always, and give the trainer."""
    torch.manual_seed(0)
    made = trainer(kind(), folder, name, steps, **settings)
    made.fit()
    return made


def saved(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name."""
    files = (folder / name / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {f"{file.name}/{key}": v for file in files for key, v in load_file(file).items()}


def differing(folder: Path, one: str, other: str, step: int) -> list[str]:
    """The tensors in which the checkpoints of two runs differ by any bit."""
    first, second = saved(folder, one, step), saved(folder, other, step)
    assert first, f"{one} has no checkpoint of step {step}"
    keys = first.keys() | second.keys()
    return sorted(
        key
        for key in keys
        if key not in first or key not in second or not torch.equal(first[key], second[key])
    )


def small(num_classes: int) -> nn.Module:
    """What `python:tests.support.odd_models:small` names: always the same weights."""
    assert num_classes == CLASSES
    torch.manual_seed(0)
    return Small()
