"""FlexMatch: a lower threshold for classes that few rows have passed so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.parts.tables import NEVER, LabelTable, WholeShards
from hpdist.algorithms.saved_state import SavedShards, Shards
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident

Shape = Literal["concave", "linear", "convex"]

_SHARDS = ("labels", "changes")

_MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "concave": lambda share: (share + 1).log() / math.log(2),
    "linear": lambda share: share,
    "convex": lambda share: share / (2 - share),
}


class FlexMatch(PseudoLabeling, name="flexmatch"):
    """L = L_x + lambda mean_b 1[max q_b >= T(argmax q_b)] H(argmax q_b, p(strong(u_b))).

    With q_b = p(weak(u_b)) and T(c) = M(beta(c)) tau (eq. 7 and 12). sigma(c) counts the rows, of
    all N, whose latest label with confidence tau or more is c (eq. 5), and beta(c) = sigma(c) /
    max(max_c sigma(c), N - sum_c sigma(c)) (eq. 11), without the second term if there is no warm-up
    (eq. 6). The counts are those before this step. If N is not known, the number of rows seen so
    far replaces it.

    Each rank holds the labels of its own rows: 2 N / ranks bytes. On several ranks the counts in
    `state` lack the last applied step, of which each rank knows only its own rows' part: that is
    summed with the next step's statistics, before that step's loss, which uses all steps.
    """

    paper: ClassVar[str] = "Zhang et al. 2021, arXiv:2110.08263"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = "The paper's values."

    num_classes: int = argument(kw_only=False)
    rows: int | None = argument(default=None)
    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label of the best-learned class needs (tau)."""
    warmup: bool = option(default=True)
    """Whether rows that have never passed keep the thresholds low while they are the most."""
    mapping: Shape = option(default="convex")
    """How a class's share scales its threshold (M): x / (2 - x), x, or ln(x + 1) / ln 2."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term (lambda)."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        self.state |= {
            "counts": torch.zeros(self.num_classes, dtype=torch.int64, device=device),  # sigma
            "seen": torch.zeros((), dtype=torch.int64, device=device),  # rows used so far
        }
        self._table = LabelTable(self.num_classes, device)
        self._used_counts = self.state  # the counts that the latest loss used

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Hold the labels of this rank's rows only."""
        self._table.bind_rank(rank, world_size)

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Each row's id and, if it is confident, its label."""
        passed, pseudo_labels = confident(weak.probabilities, self.threshold)  # [unlabeled] both
        labels = torch.where(passed > 0, pseudo_labels, NEVER)
        return {"table": self._table.pack(weak, labels)}

    def rank_statistics(self) -> dict[str, Tensor]:
        """The changes by this rank's rows that no step's sums have included yet."""
        if self._table.ranks == 1:
            return {}
        deltas = self._table.pending_deltas.float()
        return {"changes": deltas[:-1], "first": deltas[-1]}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Compute the counts: on one rank those after this step, on several those before it."""
        change = self._table.observe(sums["table"])  # by this rank's rows
        if self._table.ranks > 1:  # by all ranks' rows, of the step before
            change = torch.cat([sums["changes"], sums["first"].view(1)]).round().long()
        self.pending = {
            "counts": self.state["counts"] + change[:-1],
            "seen": self.state["seen"] + change[-1],
        }
        # On several ranks also if this step's sums are not finite: the changes always are.
        self._used_counts = self.pending if self._table.ranks > 1 else self.state

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms and the mask rate."""
        assert outputs.weak is not None
        mask, pseudo_labels = self._mask(outputs.weak)
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )

    def commit(self) -> None:
        """Make counts and labels final."""
        super().commit()
        self._table.commit(self.is_finite, self.rows)

    def discard(self) -> None:
        """Forget this step's counts and labels."""
        super().discard()
        self._table.discard()

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, and on one rank a copy of the table of labels.

        On several ranks each has only its `shards`; `hpdist.whole_state` joins them.
        """
        if self._table.ranks > 1:
            return dict(self.state)
        return {**self.state, "labels": self._table.labels()}

    def shards(self) -> Shards:
        """The labels of this rank's rows, and their changes since the counts."""
        return self._table.shards()

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state, its table of any length, saved by any number of ranks.

        Raises KeyError if neither it nor `saved` holds labels.
        """
        if saved is None or "labels" in state:
            saved = WholeShards({name: state[name] for name in _SHARDS if name in state})
            missing = "labels" not in state
        else:
            missing = not saved.size("changes")
        if missing:
            raise KeyError(
                f"state holds {sorted(state)}, expected 'labels' too; several ranks hold a part "
                "each, which `hpdist.whole_state` joins"
            )
        super().load_state_dict({k: v for k, v in state.items() if k not in _SHARDS})
        deltas = self._table.load(saved)
        self.state["counts"] += deltas[:-1]
        self.state["seen"] += deltas[-1]
        self._used_counts = self.state
        self.discard()

    @property
    def class_thresholds(self) -> Tensor:
        """The thresholds tau M(beta) of the latest loss, [classes]."""
        return self.threshold * _MAPPINGS[self.mapping](self._shares())

    def _mask(self, weak: WeakOutputs) -> tuple[Tensor, Tensor]:
        """The rows that pass, fp32 [unlabeled], and their pseudo-labels."""
        return confident(weak.probabilities, self.class_thresholds)

    def _shares(self) -> Tensor:
        """How well each class is learned, beta, fp32 [classes]."""
        counts = self._used_counts["counts"]
        most = counts.max()
        if self.warmup:
            rows = self._used_counts["seen"] if self.rows is None else self.rows
            most = torch.maximum(most, rows - counts.sum())
        return counts.float() / most.clamp(min=1)


FlexMatchConfig = FlexMatch.Config
