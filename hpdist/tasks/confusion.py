"""Meters of what each class was predicted as: a matrix of few classes, sums and pairs of many.

Up to `MOST_IN_MATRIX` classes the ranks add up a confusion matrix. With more classes, whose matrix
would take gigabytes, they add up a few numbers for each class, which give the same scores, and
collect the pairs of classes that are confused most often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hpdist.distributed.collectives import rank_rows, summed, world_size
from hpdist.tasks.metrics import Meter, Sums

MOST_IN_MATRIX = 1_000
"""Classes up to which there is a confusion matrix."""
MOST_PAIRS = 10_000
"""Pairs of classes, at most, in the list of those that are confused most often."""
TOP = 5
FEWEST_FOR_TOP = 100
"""Classes from which on there is a top-5 accuracy."""
SUMMARIZED = ("accuracy", "macro_f1", "balanced_accuracy")


def confusion_meter(task: Any, classes: int, device: torch.device | str) -> Meter:
    """Make the meter of classification for this number of classes."""
    return (Confusion if classes <= MOST_IN_MATRIX else ClassSums)(task, classes, device)


class Confusion:
    """The meter of classification: a confusion matrix of whole numbers, and the loss."""

    def __init__(self, task: Any, classes: int, device: torch.device | str) -> None:
        self._task = task
        self._classes = classes
        self._sums = Sums({"cells": classes * classes, "loss": 1, "top": 1}, device)

    def add(self, outputs: Tensor, labels: Tensor, keep: Tensor) -> None:
        """Take a batch."""
        weight = keep.double()
        self._sums.count("cells", labels * self._classes + outputs.argmax(dim=-1), weight)
        self._sums.add("loss", (self._task.losses(outputs, labels) * weight).sum())
        if self._classes >= FEWEST_FOR_TOP:
            self._sums.add("top", (_in_top(outputs, labels) * weight).sum())

    def result(self) -> Scores:
        """Give the scores of all ranks' rows."""
        total = self._sums.total()
        confusion = total["cells"].long().view(self._classes, self._classes)
        rows = confusion.sum()
        top = float(total["top"] / rows) if self._classes >= FEWEST_FOR_TOP else None
        return Scores(confusion, float(total["loss"] / rows), top)


class ClassSums:
    """The meter of classification into many classes: O(classes) numbers, whatever the rows."""

    def __init__(self, task: Any, classes: int, device: torch.device | str) -> None:
        self._task = task
        sizes = dict.fromkeys(("right", "there", "predicted"), classes)
        self._sums = Sums({**sizes, "loss": 1, "top": 1}, device)
        self._pairs = ConfusedPairs(classes, device)

    def add(self, outputs: Tensor, labels: Tensor, keep: Tensor) -> None:
        """Take a batch."""
        weight, predicted = keep.double(), outputs.argmax(dim=-1)
        self._sums.count("right", labels, weight * (predicted == labels))
        self._sums.count("there", labels, weight)
        self._sums.count("predicted", predicted, weight)
        self._sums.add("loss", (self._task.losses(outputs, labels) * weight).sum())
        self._sums.add("top", (_in_top(outputs, labels) * weight).sum())
        self._pairs.add(labels, predicted, keep)

    def result(self) -> ManyClassScores:
        """Give the scores of all ranks' rows."""
        total = self._sums.total()
        rows = total["there"].sum()
        loss, top = float(total["loss"] / rows), float(total["top"] / rows)
        pairs, complete = self._pairs.result()
        return ManyClassScores(
            total["right"], total["there"], total["predicted"], loss, top, pairs, complete
        )


class ConfusedPairs:
    """How often a row of one class was predicted as another, of the pairs that occur most often.

    It holds at most `room` pairs and as many rows. Where more pairs occur, those that were rarest
    so far are left out, and the counts are lower bounds.
    """

    def __init__(
        self, classes: int, device: torch.device | str = "cpu", room: int | None = None
    ) -> None:
        self._classes = classes
        self._room = max(2 * classes, MOST_PAIRS) if room is None else room
        self._codes = torch.zeros(0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, dtype=torch.int64, device=device)
        self._waiting: list[Tensor] = []
        self._complete = True

    def add(self, labels: Tensor, predicted: Tensor, keep: Tensor) -> None:
        """Take the wrong ones of a batch's rows; does not wait for the device but now and then."""
        wrong = keep & (labels != predicted)
        codes = torch.where(wrong, labels * self._classes + predicted, -1)
        self._waiting.append(codes)
        if sum(map(len, self._waiting)) >= self._room:
            self._count_waiting()

    def result(self) -> tuple[Tensor, bool]:
        """Give all ranks' pairs, most frequent first, and whether none was left out.

        The pairs are int64 [pairs, 3] on the CPU: class, predicted as, rows. Collective: the ranks
        exchange O(`room`) numbers, whatever their number.
        """
        self._count_waiting()
        share = max(self._room // world_size(), 1)
        self._keep_most(share)
        own = self._codes.new_zeros(2 * share + 1)
        own[: len(self._codes)] = self._codes
        own[share : share + len(self._counts)] = self._counts
        own[-1] = self._complete
        codes, counts, complete = summed(rank_rows(own)).split([share, share, 1], dim=1)
        self._codes, self._counts = _added_up(codes.reshape(-1), counts.reshape(-1))
        everything = bool(complete.all())
        self._keep_most(MOST_PAIRS)
        parts = (self._codes // self._classes, self._codes % self._classes, self._counts)
        return torch.stack(parts, dim=1).cpu(), everything and self._complete

    def _count_waiting(self) -> None:
        if self._waiting:
            fresh = torch.cat(self._waiting)
            self._waiting = []
            fresh = fresh[fresh >= 0]
            codes = torch.cat([self._codes, fresh])
            counts = torch.cat([self._counts, torch.ones_like(fresh)])
            self._codes, self._counts = _added_up(codes, counts)
            self._keep_most(self._room)

    def _keep_most(self, most: int) -> None:
        """Keep the pairs that occur most often, in this order; of equal ones the first."""
        self._complete &= len(self._codes) <= most
        order = self._counts.argsort(descending=True, stable=True)[:most]
        self._codes, self._counts = self._codes[order], self._counts[order]


def _added_up(codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each code once, ascending, with the sum of its counts; those that count 0 are left out."""
    found = counts > 0
    unique, places = codes[found].unique(return_inverse=True)
    return unique, torch.zeros_like(unique).index_add_(0, places, counts[found])


def _in_top(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is among the likeliest five, bool [rows]."""
    return (outputs.topk(TOP, dim=-1).indices == labels[:, None]).any(dim=-1)


@dataclass(frozen=True)
class Scores:
    """Scores of classification, from the confusion matrix."""

    confusion: Tensor  # int64 [classes, classes] on the CPU: rows of a class, predicted as
    loss: float
    """Mean cross-entropy."""
    top: float | None = None
    """Top-5 accuracy, where there are classes enough."""

    summarized: ClassVar = SUMMARIZED

    @property
    def values(self) -> dict[str, float]:
        """Accuracy, loss, macro-F1, balanced accuracy and, of many classes, top-5 accuracy.

        Macro-F1 is the mean F1 of the classes that are there or are predicted; balanced accuracy
        the mean recall of the classes that are there.
        """
        right = self.confusion.diagonal().double()
        there = self.confusion.sum(dim=1).double()
        predicted = self.confusion.sum(dim=0).double()
        return _values(right, there, predicted, self.loss, self.top)

    @property
    def counts(self) -> list[list[int]]:
        """The confusion matrix as lists."""
        found: list[list[int]] = self.confusion.tolist()
        return found


@dataclass(frozen=True)
class ManyClassScores:
    """Scores of classification into so many classes that there is no confusion matrix."""

    right: Tensor  # float64 [classes]: rows predicted as their class
    there: Tensor  # float64 [classes]: rows of the class
    predicted: Tensor  # float64 [classes]: rows predicted as the class
    loss: float
    """Mean cross-entropy."""
    top: float
    """Top-5 accuracy."""
    pairs: Tensor  # int64 [pairs, 3]: class, predicted as another, rows; most frequent first
    complete: bool
    """Whether no pair was left out, so that the counts are exact and not lower bounds."""

    summarized: ClassVar = SUMMARIZED
    counts: ClassVar[None] = None

    @property
    def values(self) -> dict[str, float]:
        """The scores that a confusion matrix would give; see `Scores.values`."""
        return _values(self.right, self.there, self.predicted, self.loss, self.top)

    @property
    def most_confused(self) -> dict[str, Any]:
        """The pairs [class, predicted as, rows] for JSON, and whether none was left out."""
        return {"pairs": self.pairs.tolist(), "complete": self.complete}


def _values(
    right: Tensor, there: Tensor, predicted: Tensor, loss: float, top: float | None
) -> dict[str, float]:
    """The scores by name, from rows of each class, float64 [classes]."""
    both = there + predicted
    return {
        "accuracy": float(right.sum() / there.sum()),
        "loss": loss,
        "macro_f1": float((2 * right / both)[both > 0].mean()),
        "balanced_accuracy": float((right / there)[there > 0].mean()),
        **({} if top is None else {"top_5_accuracy": top}),
    }
