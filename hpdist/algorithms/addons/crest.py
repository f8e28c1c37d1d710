"""CReST+: each generation adds pseudo-labelled rows to the labels, most of them of rare classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.addons.row_memory import RemembersRowsAddOn
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import WINDOW, MeanPrediction
from hpdist.algorithms.parts.row_tables import FIRST_ROWS, ShardedRows
from hpdist.algorithms.parts.selection import Entries, select_largest
from hpdist.algorithms.saved_state import SavedShards
from hpdist.errors import ConfigError
from hpdist.tasks.losses import hard_cross_entropy

_SMALL = 1e-6


class CReST(RemembersRowsAddOn, name="crest"):
    """Class-rebalancing self-training with progressive alignment, section 3 of the paper.

    Between generations the teacher labels all unlabelled rows. With the classes ordered by their
    labelled rows, N_1 >= ... >= N_C, the share mu_l = (N_{C+1-l} / N_1)^(1/alpha) of the rows that
    get the l-th class joins the labelled set, the most confident first: all of the rarest class. A
    generation begins with a new student and chooses anew among all rows.

    A row that has joined counts in the supervised term like a labelled one: it becomes (sum over
    the labelled rows + sum over the chosen rows, on their weak view) / (labelled + chosen rows),
    of the global batch. Targets are aligned: q p^t / mean q, made to sum to 1, with p the labels'
    shares, the mean of the predictions over the batches before, and t = 1 - (1 - t_min) g / (G - 1)
    in generation g of G.
    """

    name: ClassVar[str] = "crest"
    looks_up: ClassVar[tuple[str, ...]] = ("chosen",)
    addon_paper: ClassVar[str] = "Wei et al. 2021, arXiv:2102.09559"
    own_extra_inputs = 1
    defaults: ClassVar[str] = (
        "The paper's values for CIFAR10-LT, and the average of its authors' code."
    )

    num_classes: int = argument(kw_only=False)
    generations: int = option(default=6, ge=2)
    """Equal parts of the run; the student is reset in each."""
    alpha: float = option(default=3.0, gt=0)
    """How many rows of a frequent class are added: fewer if it is small (alpha)."""
    smallest_power: float = option(default=0.5, ge=0, le=1)
    """The power of the labels' shares that is the alignment's target in the last generation, from 1
    in the first (t_min): the smaller, the more rows of rare classes."""
    window: int = option(default=WINDOW, ge=1)
    """Batches over which predictions are averaged for the alignment."""
    momentum: float | None = option(default=None, ge=0, lt=1)
    """Replaces the window: a moving average of this momentum."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        if self.base.generations > 1:
            raise ConfigError(f"crest: {type(self.base).__name__} already has generations")
        self._mean = MeanPrediction("probability", self.window, self.momentum)
        own = {
            "generation": torch.zeros((), device=device),
            **self._mean.start(self.num_classes, device),
        }
        self.remember(own)
        if not self.base.views.weak:
            raise ConfigError(
                f"crest needs an algorithm with weak views of unlabelled rows, and "
                f"{type(self.base).__name__} has none"
            )
        self._gathered = ShardedRows(2, torch.float32, device)  # label + 1, confidence
        self._chosen = ShardedRows(1, torch.int16, device)  # label + 1 of the rows that have joined
        self.remembered = {"chosen": self._chosen}
        self._first = {name: value.clone() for name, value in self.base.state_dict().items()}

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Hold this rank's rows only."""
        super().bind_rank(rank, world_size)
        self._gathered.bind_rank(rank, world_size)

    def remembered_bytes(self, rows: int) -> int:
        """Count those of the table, and between generations 8 for the labels of each row."""
        own = -(-rows // self._gathered.ranks)
        return super().remembered_bytes(rows) + self._gathered.row_bytes * own

    @property
    def generation(self) -> int:
        """How often the student has been reset."""
        return int(self.own["generation"])

    def take_labels(self, ids: Tensor, probabilities: Tensor) -> None:
        """Store class and confidence of rows."""
        confidence, labels = probabilities.max(dim=1)
        expected = None if self.rows is None else max(self.rows, FIRST_ROWS)
        self._gathered.write(ids, torch.stack([labels + 1.0, confidence], dim=1), expected)

    def begin_generation(self) -> None:
        """Choose among all rows, and reset the inner algorithm. Collective, on several ranks."""
        chosen = self._choose()
        self._chosen.clear()
        if self._gathered.rows:
            last = torch.tensor([self._gathered.rows - 1])
            self._chosen.cover(last, self._gathered.rows)
            self._chosen.write(self._gathered.own_ids, chosen[:, None])
        self._gathered.clear()
        generation = self.own["generation"] + 1
        self.own = {
            "generation": generation,
            **self._mean.start(self.num_classes, generation.device),
        }
        self.base.load_state_dict(self._first)
        self.discard()

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Align the logits of the weak views."""
        counts = self.required_counts(weak.logits)
        power = 1 - (1 - self.smallest_power) * self.own["generation"] / (self.generations - 1)
        prior = (counts / counts.sum() + _SMALL).pow(power)
        shift = (prior / prior.sum()).log() - (self._mean.value(self.own) + _SMALL).log()
        return replace(
            weak, logits=weak.logits + shift, others=tuple(view + shift for view in weak.others)
        )

    def own_statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums of the predictions, and the number of rows that have joined."""
        joined = self.looked_up("chosen", weak.known_ids, weak.positions)[:, 0] > 0
        return {"probability": weak.probabilities.sum(dim=0), "joined": joined.sum().float()}

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Move the mean prediction."""
        self._joined = sums["joined"]
        mean = sums["probability"] / unlabeled_rows
        return self.own | self._mean.after(self.own, mean)

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Mix as the inner algorithm does, and add the weak view as a further input."""
        labels = self.looked_up("chosen", inputs.known_ids, inputs.positions)[:, 0]
        mixed = super().mix(inputs, weak)
        return replace(
            mixed,
            extra_inputs=(*mixed.extra_inputs, inputs.weak[0]),
            context={**mixed.context, "crest.labels": labels},
        )

    def add(self, outputs: StudentOutputs, terms: LossTerms) -> LossTerms:
        """The supervised term over labelled and chosen rows."""
        labels = outputs.context["crest.labels"]
        joined = (labels > 0).float()
        losses = hard_cross_entropy(outputs.extra_inputs[-1], (labels.long() - 1).clamp(min=0))
        rows = outputs.labeled_rows + self._joined
        added = (losses * joined).sum() / rows
        supervised = terms.supervised * (outputs.labeled_rows / rows) + added
        metrics = {**terms.metrics, "joined_rate": joined.sum() / outputs.unlabeled_rows}
        return replace(terms, supervised=supervised, metrics=metrics)

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over both states; raises CheckpointError if the average is of another kind."""
        self._mean.check(self._divide(state)[0], "addons: crest")
        super().load_state_dict(state, saved)

    def _choose(self) -> Tensor:
        """Give label + 1 of this rank's rows that join, the surest of each class; 0 of others."""
        ranks, gathered = self.ranks_of_rows(), self._gathered
        labels, confidence = gathered.read(gathered.own_ids).unbind(dim=1)
        known = labels > 0
        entries = Entries(confidence[known], gathered.own_ids[known], labels[known].long() - 1)

        def count(which: Callable[[Entries], Tensor]) -> Tensor:
            return ranks.sum(entries.count(which(entries), self.num_classes))

        there = count(lambda entries: entries.values >= 0).tolist()
        shares = zip(self._shares(labels).tolist(), there, strict=True)
        wanted = torch.tensor([round(share * rows) for share, rows in shares])
        wanted = wanted.to(labels.device)
        selected = select_largest(count, wanted, gathered.rows, torch.float32).of(entries)
        chosen = torch.zeros_like(labels)
        chosen[known] = labels[known] * selected
        return chosen

    def _shares(self, like: Tensor) -> Tensor:
        """The share of each class that joins, mu, [classes]."""
        counts = self.required_counts(like).clamp(min=1)
        ordered, order = counts.sort(descending=True, stable=True)
        shares = torch.empty_like(counts)
        shares[order] = (ordered.flip(0) / ordered[0]) ** (1 / self.alpha)
        return shares


CReSTConfig = CReST.Config
