"""Classification: a row is of one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hpdist.errors import DataError
from hpdist.tasks.base import (
    DIVERGENCE,
    ENTROPY,
    ONE_CLASS,
    PREDICTIONS,
    PSEUDO_LABELS,
    Task,
    TaskConfig,
)
from hpdist.tasks.confusion import SUMMARIZED, Confusion, Scores, confusion_meter
from hpdist.tasks.losses import confident, entropy, hard_cross_entropy, kl_divergence, squared_error
from hpdist.tasks.metrics import Meter
from hpdist.tasks.row_choices import IN_ALL, OF_A_CLASS, OutcomeTable, RowChoice, disagreement

if TYPE_CHECKING:
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels
    from hpdist.data.sources.label_encoding import Encoding, RowNumbers
    from hpdist.data.structures import Arrays

__all__ = ["Classification", "ClassificationConfig", "Confusion", "OneClass", "Scores"]

WHOLE_NUMBERS = "write classes as integers or strings; for numbers set task.name: regression"
"""What to do about labels that are no whole numbers, where classes are asked for."""


class Classification(Task):
    """A row is of one class: softmax and cross-entropy; labels are int64 [rows]."""

    name = "classification"
    abilities = frozenset({PREDICTIONS, DIVERGENCE, ENTROPY, PSEUDO_LABELS, ONE_CLASS})
    headline = "accuracy"
    in_percent = frozenset({"accuracy", "top_5_accuracy"})
    summarized = SUMMARIZED
    rows_have_a_class = True
    charts = ("confusion",)

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Read the column as classes: integers, strings, or what can be written as one."""
        from hpdist.data.sources.classes import list_classes
        from hpdist.data.sources.labels import LISTS

        if isinstance(stored.feature, LISTS):
            raise DataError(
                f"{stored.where}.label: column {stored.column!r} holds lists; for several classes "
                "of a row set task.name: multilabel, for several numbers task.name: regression"
            )
        return OneClass(list_classes(stored, num_classes, recorded, WHOLE_NUMBERS))

    def recorded_encoding(
        self, classes: Classes, facts: Mapping[str, Any], state: Mapping[str, Array]
    ) -> Encoding | None:
        """Read labels by the classes alone."""
        return OneClass(classes) if facts.get("class") == OneClass.__name__ else None

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p_y."""
        return hard_cross_entropy(logits, labels)

    def predictions(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return logits.softmax(dim=-1)

    def squared_error(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the squared error of the probabilities."""
        return squared_error(logits, targets)

    def divergence(self, target_logits: Tensor, logits: Tensor) -> Tensor:
        """KL(q || p)."""
        return kl_divergence(target_logits, logits)

    def entropy(self, logits: Tensor) -> Tensor:
        """H(p, p)."""
        return entropy(logits)

    def pseudo_labels(self, logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """1[max p >= tau] and argmax p."""
        return confident(logits.softmax(dim=-1), threshold)

    def pseudo_label_losses(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy."""
        return hard_cross_entropy(logits, labels) * mask

    def meter(self, outputs: Tensor) -> Meter:
        """Sum the confusion matrix, or with many classes what the scores are made of."""
        return confusion_meter(self, outputs.shape[-1], outputs.device)

    def prediction_columns(self, outputs: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Give the likeliest class by name, its probability, and all of them [rows, classes]."""
        probabilities = outputs.float().softmax(dim=-1).cpu()
        confidence, classes = probabilities.max(dim=-1)
        return {
            "label": [names[number] for number in classes.tolist()],
            "confidence": confidence.numpy(),
            "probabilities": probabilities.numpy(),
        }

    def row_outcome(self, outputs: Tensor) -> Tensor:
        """Keep the likeliest class and its probability, [rows, 2]."""
        confidence, classes = outputs.float().softmax(dim=-1).max(dim=-1)
        return torch.stack([classes.float(), confidence], dim=1)

    def row_label(self, labels: Tensor) -> Tensor:
        """Keep the class, [rows, 1]."""
        return labels[:, None]

    def row_choices(self, table: OutcomeTable, names: Sequence[str]) -> list[RowChoice]:
        """Choose each class's most and least confident rows, disagreements and mistakes.

        The last two are of all classes, the most confident first.
        """
        labels, (classes, sure) = table.labels[:, 0], table.teacher.T
        found = []
        for number, name in enumerate(names[:IN_ALL]):
            own = labels == number
            for title, scores in (("Most", sure), ("Least", -sure)):
                title = f"{title} confident: class {name}"
                found.append(RowChoice(title, own, scores, OF_A_CLASS, sure))
        wrong = "The teacher is wrong, the most confident first"
        return [
            *found,
            disagreement(classes != table.student[:, 0], sure, sure),
            RowChoice(wrong, classes != labels, sure, IN_ALL, sure),
        ]

    def row_text(self, kept: Array, names: Sequence[str]) -> str:
        """Write the class's name."""
        return names[int(kept[0])]

    def class_counts(self, logits: Tensor) -> Tensor:
        """Count the likeliest classes."""
        return logits.argmax(dim=1).bincount(minlength=logits.shape[1]).float()

    def confidence(self, logits: Tensor) -> Tensor:
        """Max p."""
        return logits.softmax(dim=1).amax(dim=1)

    def example_labels(self, rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw a class for each row, all alike."""
        return torch.randint(num_classes, (rows,), generator=generator)


class ClassificationConfig(TaskConfig):
    """A class of each row."""

    makes = Classification
    name: Literal["classification"] = "classification"


@dataclass(frozen=True)
class OneClass:
    """A class of each row: int64 [rows]; -1 where a row that is not used has none."""

    classes: Classes

    @property
    def state(self) -> Mapping[str, Array]:
        """Nothing is measured."""
        return {}

    def check(self, stored: StoredLabels) -> list[str]:
        """Hold the labels to the classes, by value; see `check_match`."""
        from hpdist.data.sources.classes import check_match

        return check_match(stored, self.classes)

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows are marked by null, NaN, an empty text or -1."""
        from hpdist.data.sources.classes import marked

        return marked(stored.values, self.classes.minus_one)

    def encode(self, stored: StoredLabels, rows: RowNumbers) -> Array:
        """Give the class numbers."""
        from hpdist.data.sources.classes import number_labels
        from hpdist.data.sources.labels import check_labels

        labels = number_labels(stored, self.classes)
        check_labels(labels, stored, self.classes, rows)
        return labels

    def class_numbers(self, labels: Any) -> Array:
        """Give the labels themselves."""
        numbers: Array = labels
        return numbers

    def describe(self, labels: Any, where: str, *, training: bool) -> list[str]:
        """Name the classes without a row, and a class that is alone."""
        from hpdist.data.sources.labels import describe_missing

        counts = np.bincount(labels, minlength=len(self.classes))
        return describe_missing(self.classes, counts, where, training)

    def fitted(self, labels: Any, state: Mapping[str, Array] | None = None) -> Encoding:
        """Nothing is to be measured."""
        return self

    def finish(self, labels: Any) -> Arrays:
        """Give them as they are."""
        arrays: Arrays = labels
        return arrays
