"""How a set was predicted, exact over all ranks: what each batch adds, and what comes of it.

Classification has its confusion matrix, summed as whole numbers. The other tasks' scores are those
of torchmetrics, in float64, whose own gathering makes them the same on any number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hpdist.distributed.collectives import summed
from hpdist.tasks.base import Multilabel, Regression, Task

_NOT_THERE = -1
"""The label of a row that does not count."""


class AnyScores(Protocol):
    """Scores of one set by one model."""

    summarized: tuple[str, ...]
    """Those that a run's summary has of what predicts; of the student it has the first alone."""

    @property
    def values(self) -> dict[str, float]:
        """By name."""
        ...

    @property
    def counts(self) -> list[list[int]] | None:
        """The confusion matrix, where there is one."""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of classification, from the confusion matrix."""

    confusion: Tensor  # int64 [classes, classes] on the CPU: rows of a class, predicted as
    loss: float
    """Mean cross-entropy."""

    summarized: ClassVar = ("accuracy", "macro_f1", "balanced_accuracy")

    @property
    def values(self) -> dict[str, float]:
        """Accuracy, loss, macro-F1 and balanced accuracy.

        Macro-F1 is the mean F1 of the classes that are there or are predicted; balanced accuracy
        the mean recall of the classes that are there.
        """
        right = self.confusion.diagonal().double()
        there = self.confusion.sum(dim=1).double()
        predicted = self.confusion.sum(dim=0).double()
        both = there + predicted
        return {
            "accuracy": float(right.sum() / there.sum()),
            "loss": self.loss,
            "macro_f1": float((2 * right / both)[both > 0].mean()),
            "balanced_accuracy": float((right / there)[there > 0].mean()),
        }

    @property
    def counts(self) -> list[list[int]]:
        """The confusion matrix as lists."""
        found: list[list[int]] = self.confusion.tolist()
        return found


@dataclass(frozen=True)
class PlainScores:
    """Scores of a task without a confusion matrix."""

    values: dict[str, float]
    summarized: tuple[str, ...]
    counts: None = None


class Meter(Protocol):
    """Collects what a set's scores are made of."""

    def add(self, logits: Tensor, labels: Tensor, keep: Tensor) -> None:
        """Take a batch, [batch, classes] and its labels; `keep`, bool [batch], says which rows."""
        ...

    def result(self) -> AnyScores:
        """The scores of all ranks' rows. Collective: every rank must call."""
        ...


class _Confusion:
    """The meter of classification."""

    def __init__(self, task: Task, classes: int, device: torch.device | str) -> None:
        self._task = task
        self._classes = classes
        self._sums = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, keep: Tensor) -> None:
        weight = keep.double()
        cells = labels * self._classes + logits.argmax(dim=-1)  # [batch]
        self._sums.index_add_(0, cells, weight)
        self._sums[-1] += (self._task.losses(logits, labels) * weight).sum()

    def result(self) -> Scores:
        total = summed(self._sums).cpu()  # counts are exact up to 2^53
        confusion = total[:-1].long().view(self._classes, self._classes)
        return Scores(confusion, float(total[-1] / confusion.sum()))


class _Measured:
    """By metrics of torchmetrics, which are given predictions and labels of the rows that count."""

    def __init__(self, task: Task, classes: int, device: torch.device | str) -> None:
        self._task = task
        self._classes = classes
        self._metrics = {
            name: metric.set_dtype(torch.float64).to(device)
            for name, metric in self._make().items()
        }
        # Rows, the sum of their losses, and of their labels.
        self._sums = torch.zeros(2 + classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, keep: Tensor) -> None:
        logits, labels, weight = logits.double(), labels.double(), keep.double()
        losses = self._task.losses(logits, labels) * weight
        present = (labels * weight[:, None]).sum(dim=0)
        self._sums += torch.cat((torch.stack((weight.sum(), losses.sum())), present))
        predictions = self._task.predictions(logits)
        for name, metric in self._metrics.items():
            self._update(name, metric, predictions, labels, keep)

    def result(self) -> PlainScores:
        rows, loss, *labels = summed(self._sums).tolist()
        with warnings.catch_warnings():  # of classes without positives, which are left out below
            warnings.simplefilter("ignore", UserWarning)
            found = {
                name: metric.compute().detach().double().cpu()
                for name, metric in self._metrics.items()
                if rows > 1 or name not in self._of_several_rows
            }
        values = self._values(found, torch.tensor(labels))
        return PlainScores({**values, "loss": loss / rows}, tuple(values))

    _of_several_rows: ClassVar[tuple[str, ...]] = ()

    def _make(self) -> dict[str, Any]:
        raise NotImplementedError

    def _update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        raise NotImplementedError

    def _values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        raise NotImplementedError


class _SeveralClasses(_Measured):
    """The meter of multilabel: average precision keeps every prediction; every rank gathers all."""

    def _make(self) -> dict[str, Any]:
        from torchmetrics.classification import (
            MultilabelAveragePrecision,
            MultilabelExactMatch,
            MultilabelF1Score,
        )

        assert isinstance(self._task, Multilabel)
        common: dict[str, Any] = {"num_labels": self._classes, "validate_args": False}
        decided = common | {"threshold": self._task.threshold}
        return {
            "average_precision": MultilabelAveragePrecision(
                average="none", ignore_index=_NOT_THERE, **common
            ),
            "micro_f1": MultilabelF1Score(average="micro", **decided),
            "macro_f1": MultilabelF1Score(average="macro", **decided),
            "exact_match": MultilabelExactMatch(**decided),
        }

    def _update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        targets = labels.long()
        if name == "average_precision":
            # Equally many on every rank: torchmetrics cannot gather from one that has none.
            metric.update(predictions, targets.masked_fill(~keep[:, None], _NOT_THERE))
        elif keep.any():  # nor count none
            metric.update(predictions[keep], targets[keep])

    def _values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Average precision is the mean over the classes that are there, NaN if none is."""
        precision = found["average_precision"][labels > 0].mean()
        names = ("micro_f1", "macro_f1", "exact_match")
        return {
            "mean_average_precision": float(precision),
            **{name: float(found[name]) for name in names},
        }


class _Targets(_Measured):
    """The meter of regression, in the targets' own units: the mean over the targets."""

    _of_several_rows = ("r2",)

    def _make(self) -> dict[str, Any]:
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

        return {
            "rmse": MeanSquaredError(squared=False, num_outputs=self._classes),
            "mae": MeanAbsoluteError(num_outputs=self._classes),
            "r2": R2Score(multioutput="raw_values"),
        }

    def _update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        metric.update(predictions[keep], labels[keep])

    def _values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """R2, which no unit changes, is NaN of a single row."""
        assert isinstance(self._task, Regression)
        spread = torch.tensor(self._task.spread or (1.0,) * self._classes, dtype=torch.float64)
        nothing = torch.tensor(float("nan"))
        return {
            "rmse": float((found["rmse"] * spread).mean()),
            "mae": float((found["mae"] * spread).mean()),
            "r2": float(found.get("r2", nothing).mean()),
        }


_METERS: dict[str, Any] = {
    "classification": _Confusion,
    "multilabel": _SeveralClasses,
    "regression": _Targets,
}


def make_meter(task: Task, classes: int, device: torch.device | str) -> Meter:
    """What collects a task's scores, of outputs [rows, classes]."""
    made: Meter = _METERS[task.name](task, classes, device)
    return made
