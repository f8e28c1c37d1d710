"""Several labels: a row is of any number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hpdist.errors import DataError
from hpdist.tasks.base import DIVERGENCE, ENTROPY, PREDICTIONS, PSEUDO_LABELS, Task, TaskConfig
from hpdist.tasks.classification import WHOLE_NUMBERS
from hpdist.tasks.metrics import Meter, TorchMetrics
from hpdist.tasks.row_choices import IN_ALL, OF_A_CLASS, OutcomeTable, RowChoice, disagreement

if TYPE_CHECKING:
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels
    from hpdist.data.sources.label_encoding import Encoding, RowNumbers
    from hpdist.data.structures import Arrays

Lists = Literal["auto", "ids", "vector"]

_NOT_THERE = -1
"""The label of a row that does not count."""


class Multilabel(Task):
    """A row is of any number of classes: one logistic output each; labels are 0/1 fp32 [rows, C].

    Args:
        threshold: The probability from which on a class is predicted, in scores and predictions.
        labels: What the lists of the column hold: see `MultilabelConfig`.
    """

    name = "multilabel"
    abilities = frozenset({PREDICTIONS, DIVERGENCE, ENTROPY, PSEUDO_LABELS})
    headline = "mean_average_precision"
    summarized = ("mean_average_precision", "micro_f1", "macro_f1", "exact_match")
    names_are = "labels"

    def __init__(self, threshold: float = 0.5, labels: Lists = "auto") -> None:
        self.threshold = threshold
        self.labels = labels

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Read the column as lists: of a row's classes, or of 0 or 1 for every class."""
        from hpdist.data.sources.classes import Classes, list_classes
        from hpdist.data.sources.labels import is_blank

        inner = _inner(stored)
        lists = [value for value in stored.values if not is_blank(value, minus_one=True)]
        vector = _is_vector(self.labels, stored, inner, lists)
        if vector:
            classes = Classes(tuple(map(str, range(_width(stored, lists, num_classes)))))
        else:
            classes = list_classes(
                stored.of(inner, _flat(lists)), num_classes, recorded, WHOLE_NUMBERS
            )
        if len(classes) < 2:
            raise DataError(
                f"{stored.where}.label: column {stored.column!r} has {len(classes)} classes, and "
                "task.name: multilabel needs two or more; for one yes or no use task.name: "
                "classification"
            )
        return ManyClasses(classes, vector)

    def recorded_encoding(
        self, classes: Classes, facts: Mapping[str, Any], state: Mapping[str, Array]
    ) -> Encoding | None:
        """Read lists by the classes, and by what a list of the labelled set held."""
        if facts.get("class") != ManyClasses.__name__:
            return None
        return ManyClasses(classes, bool(facts.get("vector")))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """mean_c of the binary cross-entropy -y_c log p_c - (1 - y_c) log(1 - p_c)."""
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)

    def predictions(self, logits: Tensor) -> Tensor:
        """Give the logistic function of each."""
        return logits.sigmoid()

    def divergence(self, target_logits: Tensor, logits: Tensor) -> Tensor:
        """mean_c KL(Bernoulli(q_c) || Bernoulli(p_c))."""
        targets = target_logits.sigmoid()
        own = targets * (F.logsigmoid(target_logits) - F.logsigmoid(logits))
        other = (1 - targets) * (F.logsigmoid(-target_logits) - F.logsigmoid(-logits))
        return (own + other).mean(dim=-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """mean_c of the entropy of Bernoulli(p_c)."""
        return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").mean(
            dim=-1
        )

    def pseudo_labels(self, logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """1[max(p_c, 1 - p_c) >= tau] and 1[p_c > 1/2], each [rows, classes]."""
        p = logits.sigmoid()
        mask = (torch.maximum(p, 1 - p) >= threshold).float()
        return mask, (logits > 0).to(logits.dtype)

    def pseudo_label_losses(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """mean_c of the binary cross-entropy, over all classes and not only those that pass."""
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (losses * mask).mean(dim=-1)

    def meter(self, outputs: Tensor) -> Meter:
        """Gather every prediction, which average precision needs."""
        return _SeveralClasses(self, outputs.shape[-1], outputs.device)

    def prediction_columns(self, outputs: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Give the names of each row's classes, and all probabilities [rows, classes]."""
        probabilities = outputs.float().sigmoid().cpu()
        predicted = (probabilities > self.threshold).tolist()
        return {
            "label": [[names[c] for c, there in enumerate(row) if there] for row in predicted],
            "probabilities": probabilities.numpy(),
        }

    def row_outcome(self, outputs: Tensor) -> Tensor:
        """Keep all probabilities, [rows, classes]."""
        return outputs.float().sigmoid()

    def row_choices(self, table: OutcomeTable, names: Sequence[str]) -> list[RowChoice]:
        """Choose each label's most confident false positives and negatives, and disagreements.

        Rows in which teacher and student predict different labels come by the largest difference of
        a probability.
        """
        there, predicted = table.labels > 0.5, table.teacher > self.threshold
        found = []
        for number, name in enumerate(names[:IN_ALL]):
            p, its, its_predicted = table.teacher[:, number], there[:, number], predicted[:, number]
            extra = f"Wrongly given the label {name}, the most confident first"
            missed = f"Wrongly not given the label {name}, the least likely first"
            found += [
                RowChoice(extra, its_predicted & ~its, p, OF_A_CLASS, p, name),
                RowChoice(missed, its & ~its_predicted, -p, OF_A_CLASS, p, name),
            ]
        differ = (predicted != (table.student > self.threshold)).any(axis=1)
        differences = np.abs(table.teacher - table.student).max(axis=1)
        return [*found, disagreement(differ, differences)]

    def row_text(self, kept: Array, names: Sequence[str]) -> str:
        """Write the names of the labels that are predicted, or of the row's own."""
        return ", ".join(names[int(n)] for n in np.flatnonzero(kept > self.threshold)) or "none"

    def example_labels(self, rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw 0 or 1 for each class of each row, all alike."""
        return torch.rand((rows, num_classes), generator=generator).round()


class MultilabelConfig(TaskConfig):
    """Any number of classes of each row, in a list."""

    makes = Multilabel
    name: Literal["multilabel"] = "multilabel"
    labels: Lists = "auto"
    """What a list holds: ids, the row's classes; vector, 0 or 1 for every class.

    auto goes by the column's type and, of lists of integers, by what they hold.
    """
    threshold: float = Field(0.5, gt=0, lt=1)
    """The probability from which on a class counts as predicted, in F1 and exact match."""


@dataclass(frozen=True)
class ManyClasses:
    """Any number of classes of each row, from lists: 0/1 fp32 [rows, classes].

    A list holds the row's classes (`ids`), or 0 or 1 for every class (`vector`).
    """

    classes: Classes
    vector: bool

    @property
    def state(self) -> Mapping[str, Array]:
        """Nothing is measured."""
        return {}

    def record(self) -> dict[str, Any]:
        """Say what a list holds, as JSON, for a model's folder."""
        return {"vector": self.vector}

    def check(self, stored: StoredLabels) -> list[str]:
        """Hold the lists to the classes, by value; raise DataError unless there are lists."""
        from hpdist.data.sources.classes import check_match

        inner = _inner(stored)
        return (
            [] if self.vector else check_match(stored.of(inner, _flat(stored.values)), self.classes)
        )

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows have null or a list of marks; an empty list is a row of no class."""
        from hpdist.data.sources.labels import is_blank

        minus_one = self.classes.minus_one
        blank = (is_blank(value, minus_one) for value in stored.values)
        return np.fromiter(blank, bool, len(stored.values))

    def encode(self, stored: StoredLabels, rows: RowNumbers) -> Array:
        """Give a column for every class."""
        labels = np.zeros((len(stored.values), len(self.classes)), np.float32)
        used = set(rows)
        numbers = {} if self.vector else self._numbers(stored)
        for row, value in enumerate(stored.values):
            reason = "it is null" if value is None else self._fill(labels[row], value, numbers)
            if reason is not None and row in used:
                raise DataError(stored.refusal(row, f": {reason}"))
        return labels

    def _numbers(self, stored: StoredLabels) -> dict[Any, int]:
        """Give the class of every label that a list holds."""
        from hpdist.data.sources.classes import number_labels

        labels = stored.of(_inner(stored), _flat(stored.values))
        return dict(zip(labels.values, number_labels(labels, self.classes).tolist(), strict=True))

    def _fill(self, out: Array, value: list[Any], numbers: dict[Any, int]) -> str | None:
        if self.vector:
            if len(value) != len(out):
                return f"it has {len(value)} values for {len(out)} classes"
            if any(v not in (0, 1) for v in value):  # None is in neither
                return "its values are not all 0 or 1"
            out[:] = value
            return None
        found = [numbers.get(label, -1) for label in value]
        if -1 in found:
            wrong = value[found.index(-1)]
            return f"{wrong!r} is none of the {len(out)} classes ({self.classes.shown})"
        out[found] = 1
        return None

    def class_numbers(self, labels: Any) -> None:
        """Give none: a row is not of one class."""
        return

    def describe(self, labels: Any, where: str, *, training: bool) -> list[str]:
        """Name the classes that no row has."""
        from hpdist.data.sources.labels import describe_missing

        return describe_missing(self.classes, labels.sum(axis=0), where, training)

    def fitted(self, labels: Any, state: Mapping[str, Array] | None = None) -> Encoding:
        """Nothing is to be measured."""
        return self

    def finish(self, labels: Any) -> Arrays:
        """Give them as they are."""
        arrays: Arrays = labels
        return arrays


class _SeveralClasses(TorchMetrics):
    """Average precision keeps every prediction; every rank gathers all."""

    task: Multilabel

    def make(self) -> dict[str, Any]:
        from torchmetrics.classification import (
            MultilabelAveragePrecision,
            MultilabelExactMatch,
            MultilabelF1Score,
        )

        common: dict[str, Any] = {"num_labels": self.classes, "validate_args": False}
        decided = common | {"threshold": self.task.threshold}
        return {
            "average_precision": MultilabelAveragePrecision(
                average="none", ignore_index=_NOT_THERE, **common
            ),
            "micro_f1": MultilabelF1Score(average="micro", **decided),
            "macro_f1": MultilabelF1Score(average="macro", **decided),
            "exact_match": MultilabelExactMatch(**decided),
        }

    def update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        targets = labels.long()
        if name == "average_precision":
            # Equally many on every rank: torchmetrics cannot gather from one that has none.
            metric.update(predictions, targets.masked_fill(~keep[:, None], _NOT_THERE))
        elif keep.any():  # nor count none
            metric.update(predictions[keep], targets[keep])

    def values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Average precision is the mean over the classes that are there, NaN if none is."""
        precision = found["average_precision"][labels > 0].mean()
        names = ("micro_f1", "macro_f1", "exact_match")
        return {
            "mean_average_precision": float(precision),
            **{name: float(found[name]) for name in names},
        }


def _inner(stored: StoredLabels) -> Any:
    """Say what the lists of a column hold; raises DataError where it holds none."""
    from hpdist.data.sources.classes import label_kind
    from hpdist.data.sources.labels import LISTS

    feature = stored.feature
    if not isinstance(feature, LISTS):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {feature}; task.name: multilabel "
            "needs lists, of a row's classes or of a 0 or 1 for every class"
        )
    label_kind(feature.feature, stored.where, stored.column)
    return feature.feature


def _width(stored: StoredLabels, lists: list[Any], num_classes: int | None) -> int:
    """Count the values that every list has; raises DataError where the model has other classes."""
    fixed = getattr(stored.feature, "length", -1)
    width = int(fixed if fixed > 0 else max(map(len, lists), default=0))
    if num_classes not in (None, width):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} has lists of {width}, but "
            f"model.num_classes is {num_classes}; make them equal"
        )
    return width


def _is_vector(choice: Lists, stored: StoredLabels, inner: Any, lists: list[Any]) -> bool:
    """Whether lists hold 0 or 1 for every class, in place of the numbers of a row's classes."""
    from hpdist.data.sources.classes import label_kind

    if choice != "auto":
        return choice == "vector"
    kind = label_kind(inner, stored.where, stored.column)
    if kind in ("class", "text", "bytes", "time"):
        return False
    if getattr(stored.feature, "length", -1) > 0 or kind in ("number", "boolean"):
        return True
    lengths = {len(value) for value in lists}
    if len(lengths) != 1 or lengths <= {0, 1} or set(_flat(lists)) - {0, 1}:
        return False
    if any(len(set(value)) < len(value) for value in lists):
        return True  # a list of classes names each once
    raise DataError(
        f"{stored.where}.label: column {stored.column!r} holds pairs of 0 and 1, which may be the "
        "numbers of a row's classes, or a 0 or 1 for each of two; set task.labels: ids, or "
        "task.labels: vector"
    )


def _flat(lists: Sequence[Any]) -> list[Any]:
    return [value for one in lists if one is not None for value in one if value is not None]
