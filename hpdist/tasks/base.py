"""What a model's outputs mean: one class of a row, several classes, or numbers.

An algorithm asks its task for the loss of labelled rows, for predictions, for how far two of them
are apart, and for pseudo-labels, and so need not know which task it is. Every loss is of each row,
[rows], in fp32; where a row has several classes or targets it is the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.errors import ConfigError
from hpdist.tasks.losses import confident, entropy, hard_cross_entropy, kl_divergence, squared_error


class Task:
    """The base of every task."""

    name: ClassVar[str]
    headline: ClassVar[str]
    """The score that the best evaluation is chosen by, and the log shows."""
    larger_is_better: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    """The model's outputs that it goes by. What is `logits` below is one tensor where they are the
    logits alone, else these tensors by name, fp32 where floating-point."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of each labelled row, [rows]; `labels` as a `LabeledBatch` has them."""
        raise NotImplementedError

    def predictions(self, logits: Tensor) -> Tensor:
        """What consistency is asked of, [rows, classes]: probabilities, or the numbers."""
        raise NotImplementedError

    def squared_error(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_c (p_c - q_c)^2, [rows], with p the predictions of `logits` and q `targets`."""
        return (self.predictions(logits) - targets).square().mean(dim=-1)

    def divergence(self, target_logits: Tensor, logits: Tensor) -> Tensor:
        """How far predictions are from those of `target_logits`, [rows]; 0 where they agree."""
        raise NotImplementedError

    def entropy(self, logits: Tensor) -> Tensor:
        """Give the entropy of the predictions, [rows]. Raises ConfigError where they have none."""
        raise ConfigError(
            f"task.name: {self.name} has no entropy; set algorithm.entropy_weight to 0, or choose "
            "another algorithm"
        )

    def pseudo_labels(self, logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Which pseudo-labels reach a threshold, fp32, and what they are.

        [rows] both, or [rows, classes] where every class is decided on its own. Raises ConfigError
        where predictions have no confidence.
        """
        raise ConfigError(f"task.name: {self.name} has no confidence; choose another algorithm")

    def pseudo_label_losses(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Give the loss of pseudo-labels where `mask` holds, [rows]; the others count as 0."""
        raise ConfigError(f"task.name: {self.name} has no pseudo-labels; choose another algorithm")

    def class_counts(self, logits: Tensor) -> Tensor | None:
        """How many rows each class takes, fp32 [classes]; None where a row is not of one class."""
        return None


class Classification(Task):
    """A row is of one class: softmax and cross-entropy; labels are int64 [rows]."""

    name = "classification"
    headline = "accuracy"

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

    def class_counts(self, logits: Tensor) -> Tensor:
        """Count the likeliest classes."""
        return logits.argmax(dim=1).bincount(minlength=logits.shape[1]).float()


class Multilabel(Task):
    """A row is of any number of classes: one logistic output each; labels are 0/1 fp32 [rows, C].

    `threshold` is the probability from which on a class is predicted, in scores.
    """

    name = "multilabel"
    headline = "mean_average_precision"

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """mean_c of the binary cross-entropy -y_c log p_c - (1 - y_c) log(1 - p_c)."""
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)

    def predictions(self, logits: Tensor) -> Tensor:
        """The logistic function of each."""
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


class Regression(Task):
    """A row has one or several numbers: squared error; labels are fp32 [rows, targets].

    Labels and outputs are standardised. `spread`, one for each target, is what 1 stands for in the
    targets' own units: scores are in those.
    """

    name = "regression"
    headline = "rmse"
    larger_is_better = False

    def __init__(self, spread: tuple[float, ...] | None = None) -> None:
        self.spread = spread

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """mean_c (z_c - y_c)^2."""
        return (logits - labels).square().mean(dim=-1)

    def predictions(self, logits: Tensor) -> Tensor:
        """The outputs themselves."""
        return logits

    def divergence(self, target_logits: Tensor, logits: Tensor) -> Tensor:
        """The squared error: up to its scale the KL divergence of two normal distributions."""
        return self.squared_error(logits, target_logits)


CLASSIFICATION = Classification()
ALL = (Classification.name, Multilabel.name, Regression.name)
"""The names of all tasks."""


def make_task(name: str, threshold: float = 0.5, spread: tuple[float, ...] | None = None) -> Task:
    """The task of a name: `threshold` is multilabel's, `spread` regression's."""
    made: dict[str, Callable[[], Task]] = {
        Classification.name: Classification,
        Multilabel.name: lambda: Multilabel(threshold),
        Regression.name: lambda: Regression(spread),
    }
    return made[name]()


def share(mask: Tensor) -> Tensor:
    """The share of a row's decisions that a mask of pseudo-labels holds for, [rows]."""
    return mask if mask.dim() == 1 else mask.mean(dim=-1)
