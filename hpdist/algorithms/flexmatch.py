"""FlexMatch: a lower threshold for the classes that few rows have passed for so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    WeakOutputs,
    masked_pseudo_label_loss,
    supervised_loss,
)
from hpdist.algorithms.tables import NEVER, LabelTable, take
from hpdist.algorithms.targets import confident

Shape = Literal["concave", "linear", "convex"]

_MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "concave": lambda share: (share + 1).log() / math.log(2),
    "linear": lambda share: share,
    "convex": lambda share: share / (2 - share),
}


class FlexMatchConfig(AlgorithmConfig):
    """The paper's values."""

    name: Literal["flexmatch"] = "flexmatch"
    threshold: float = Field(0.95, ge=0, le=1)
    """Confidence that a pseudo-label of the best learned class needs (tau)."""
    warmup: bool = True
    """Whether rows that have never passed hold the thresholds down while they are the most."""
    mapping: Shape = "convex"
    """How a class's share becomes its threshold's (M): x / (2 - x), x, or ln(x + 1) / ln 2."""
    unsupervised_weight: float = Field(1.0, ge=0)
    """Weight of the unsupervised term (lambda)."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> FlexMatch:
        """Make the algorithm, its state on `device`."""
        return FlexMatch(
            num_classes,
            threshold=self.threshold,
            warmup=self.warmup,
            mapping=self.mapping,
            unsupervised_weight=self.unsupervised_weight,
            device=device,
        )


class FlexMatch(Algorithm):
    """L = L_x + lambda mean_b 1[max q_b >= T(argmax q_b)] H(argmax q_b, p(strong(u_b))).

    With q_b = p(weak(u_b)) and T(c) = M(beta(c)) tau (eq. 7 and 12). sigma(c) counts the rows, of
    all N, whose latest label with confidence tau or more is c (eq. 5), and beta(c) = sigma(c) /
    max(max_c sigma(c), N - sum_c sigma(c)) (eq. 11), without the second term if there is no warm-up
    (eq. 6). The counts are those before this step. Where N is not known, the rows seen so far
    stand for it.
    """

    paper: ClassVar[str] = "Zhang et al. 2021, arXiv:2110.08263"
    views: ClassVar[Views] = Views(weak=1, strong=1)

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.95,
        warmup: bool = True,
        mapping: Shape = "convex",
        unsupervised_weight: float = 1.0,
        rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.warmup = warmup
        self.mapping = _MAPPINGS[mapping]
        self.unsupervised_weight = unsupervised_weight
        self.rows = rows
        self.state = {
            "counts": torch.zeros(num_classes, dtype=torch.int64, device=device),  # sigma
            "seen": torch.zeros((), dtype=torch.int64, device=device),  # rows used so far
        }
        self._table = LabelTable(num_classes, device)
        self.discard()

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Every row's id and, if it is confident, its label."""
        passed, pseudo_labels = confident(weak.probabilities, self.threshold)  # [unlabeled] both
        labels = torch.where(passed > 0, pseudo_labels, NEVER)
        return {"table": self._table.pack(weak, labels)}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Work out the counts after this step."""
        change, first = self._table.observe(sums["table"])
        self.pending = {
            "counts": self.state["counts"] + change,
            "seen": self.state["seen"] + first,
        }

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms and the mask rate."""
        assert outputs.weak is not None
        mask, pseudo_labels = self._mask(outputs.weak)
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def commit(self) -> None:
        """Make counts and labels final."""
        super().commit()
        self._table.commit(self.sound, self.rows)

    def discard(self) -> None:
        """Forget this step's counts and labels."""
        super().discard()
        self._table.discard()

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, and a copy of the table of labels."""
        return {**self.state, "labels": self._table.labels()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, its table of any length."""
        rest, labels = take(state, "labels")
        super().load_state_dict(rest)
        self._table.load(labels)

    @property
    def class_thresholds(self) -> Tensor:
        """Tau M(beta), [classes]."""
        return self.threshold * self.mapping(self._shares())

    def _mask(self, weak: WeakOutputs) -> tuple[Tensor, Tensor]:
        """Which rows pass, fp32 [unlabeled], and their pseudo-labels."""
        return confident(weak.probabilities, self.class_thresholds)

    def _shares(self) -> Tensor:
        """How well each class is learned, beta, fp32 [classes]."""
        counts = self.state["counts"]
        most = counts.max()
        if self.warmup:
            rows = self.state["seen"] if self.rows is None else self.rows
            most = torch.maximum(most, rows - counts.sum())
        return counts.float() / most.clamp(min=1)
