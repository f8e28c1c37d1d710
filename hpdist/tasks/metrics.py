"""Meters that tasks have in common: how a set was predicted, exact over all ranks.

A meter is given the batches of a set. What it collects is either sums, which the ranks add up, or
rows that a metric of torchmetrics keeps and gathers: the scores are the same on any number of
ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hpdist.aliases import find_moved
from hpdist.distributed.collectives import summed


class AnyScores(Protocol):
    """Scores of one set by one model."""

    @property
    def summarized(self) -> tuple[str, ...]:
        """Those that a run's summary has of what predicts; of the student the first alone."""
        ...

    @property
    def values(self) -> dict[str, float]:
        """By name."""
        ...

    @property
    def counts(self) -> list[list[int]] | None:
        """The confusion matrix, where there is one.

        Scores of many classes may have `most_confused` instead; see `confused_pairs`.
        """
        ...


@dataclass(frozen=True)
class PlainScores:
    """Scores by name, and the confusion matrix where there is one."""

    values: dict[str, float]
    summarized: tuple[str, ...]
    counts: list[list[int]] | None = None


def confused_pairs(scores: AnyScores) -> dict[str, Any] | None:
    """Give the most confused pairs of classes for JSON, of scores that have some and no matrix.

    `pairs` are [class, predicted as, rows], most frequent first; `complete` says whether none was
    left out.
    """
    found: dict[str, Any] | None = getattr(scores, "most_confused", None)
    return found


class Meter(Protocol):
    """Collects what a set's scores are made of."""

    def add(self, outputs: Any, labels: Any, keep: Tensor) -> None:
        """Take a batch: outputs and labels, each one tensor or tensors by name, [rows, *].

        `keep`, bool [rows], says which rows count.
        """
        ...

    def result(self) -> AnyScores:
        """Give the scores of all ranks' rows. Collective: every rank must call."""
        ...


class Sums:
    """Sums by name, in float64, that the ranks add up in the end: whole numbers up to 2^53."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str) -> None:
        self._sizes = dict(sizes)
        self._flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        parts = torch.split(self._flat, list(self._sizes.values()))
        self._parts = dict(zip(self._sizes, parts, strict=True))

    def add(self, name: str, values: Tensor) -> None:
        """Add to a sum; `values` has its size, or is a single number for a sum of one."""
        self._parts[name] += values

    def count(self, name: str, places: Tensor, weight: Tensor) -> None:
        """Add weights [rows] to a sum, each at a place of it, int64 [rows]."""
        self._parts[name].index_add_(0, places, weight.double())

    def total(self) -> dict[str, Tensor]:
        """Give the sums over all ranks, on the CPU. Collective: every rank must call."""
        parts = torch.split(summed(self._flat).cpu(), list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))


class MeasuringTask(Protocol):
    """What `TorchMetrics` asks of a task."""

    @property
    def summarized(self) -> tuple[str, ...]:
        """The scores that a run's summary has."""
        ...

    def losses(self, logits: Any, labels: Any) -> Tensor:
        """Give the loss of each row."""
        ...

    def predictions(self, logits: Any) -> Any:
        """Give what is predicted of each row."""
        ...


class TorchMetrics:
    """The base of meters by metrics of torchmetrics, in float64, of outputs [rows, classes].

    The metrics are given predictions and labels of the rows that count. What they gather makes them
    the same on any number of ranks.
    """

    of_several_rows: ClassVar[tuple[str, ...]] = ()
    """Metrics that have no meaning for a single row."""

    task: Any

    def __init__(self, task: MeasuringTask, classes: int, device: torch.device | str) -> None:
        self.task = task
        self.classes = classes
        self._metrics = {
            name: metric.set_dtype(torch.float64).to(device) for name, metric in self.make().items()
        }
        self._sums = Sums({"rows": 1, "loss": 1, "labels": classes}, device)

    def add(self, outputs: Tensor, labels: Tensor, keep: Tensor) -> None:
        """Take a batch."""
        outputs, labels, weight = outputs.double(), labels.double(), keep.double()
        self._sums.add("rows", weight.sum())
        self._sums.add("loss", (self.task.losses(outputs, labels) * weight).sum())
        self._sums.add("labels", (labels * weight[:, None]).sum(dim=0))
        predictions = self.task.predictions(outputs)
        for name, metric in self._metrics.items():
            self.update(name, metric, predictions, labels, keep)

    def result(self) -> PlainScores:
        """Give the scores of all ranks' rows, the loss last."""
        sums = self._sums.total()
        rows = float(sums["rows"])
        with warnings.catch_warnings():  # of classes without positives, which are left out below
            warnings.simplefilter("ignore", UserWarning)
            found = {
                name: metric.compute().detach().double().cpu()
                for name, metric in self._metrics.items()
                if rows > 1 or name not in self.of_several_rows
            }
        values = self.values(found, sums["labels"])
        loss = float(sums["loss"]) / rows
        return PlainScores({**values, "loss": loss}, tuple(self.task.summarized))

    def make(self) -> dict[str, Any]:
        """Make the metrics, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define make()")

    def update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        """Give a metric a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define update()")

    def values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Give the scores, from what the metrics found and the sums of the labels [classes]."""
        raise NotImplementedError(f"{type(self).__name__} must define values()")


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
