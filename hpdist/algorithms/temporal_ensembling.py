"""Temporal ensembling: a row's prediction follows the average of its earlier ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.parts.row_tables import RemembersRows, ShardedRows
from hpdist.algorithms.parts.tables import encode_ids, last_occurrences, scatter_to_global
from hpdist.algorithms.protocol import TAKEN
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PREDICTIONS


class TemporalEnsembling(RemembersRows, Ramped, name="temporal_ensembling"):
    """L = L_x + w(t) mean_{b,c} (p(u2_b)_c - z~_b,c)^2, algorithm 2 of the paper.

    Whenever a row is seen, Z_i <- alpha Z_i + (1 - alpha) p(u1_i), from zero; its target is that of
    the earlier times, z~_i = Z_i / (1 - alpha^n_i) after n_i of them. A row seen for the first time
    has no target and adds nothing. Here u1 and u2 are weak views, and w is the Pi-model's.

    Each rank holds the rows that it owns, rows by classes: for a million rows and 100 classes 400
    MB / ranks, or half of that in fp16, and up to twice that if the number of rows is not known, as
    it then grows by doubling. With `top` it is 6 bytes or 8 for each of so many classes of a row:
    the averages of the others are taken for 0 whenever the row is seen. Checkpoints hold the table.
    A step's predictions reach all ranks with its other sums, as C + 2 floats for each unlabelled
    row of the global batch. On several ranks two more sums go before: the ids of these rows, and
    what their owners remember of them. Once a step the host waits for the ids.
    """

    paper: ClassVar[str] = "Laine and Aila 2017, arXiv:1610.02242"
    views: ClassVar[Views] = Views(weak=1, student_weak=1)
    needs: ClassVar[frozenset[str]] = frozenset({PREDICTIONS})
    shape = "gaussian"
    defaults: ClassVar[str] = "The paper's values; its ramp is 80 of 300 epochs."

    num_classes: int = argument(kw_only=False)
    momentum: float = option(default=0.6, ge=0, lt=1)
    """Momentum of a row's average (alpha)."""
    unsupervised_weight: float = option(default=30.0, ge=0)
    """Weight of the consistency term after the ramp (w_max). The paper's factor M / N, labelled by
    all rows, is part of the means: here each term is the mean over its own rows."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.27, default=0, ge=0, le=1)
    """Share of the run over which that weight rises."""
    half_table: bool = option(default=False)
    """Whether the averages are kept in fp16, at half the memory."""
    top: int | None = option(default=None, ge=1)
    """Keep only so many of a row's averages, the largest; by default those of all classes."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        dtype = torch.float16 if self.half_table else torch.float32
        self.averages = ShardedRows(self.num_classes, dtype, device, self.top)  # Z
        self.counts = ShardedRows(None, torch.float32, device)  # n
        self.remembered = {"averages": self.averages, "counts": self.counts}
        self._batch: dict[str, Tensor] = {}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Each row's prediction at its position in the global batch; the sum is a gather."""
        return {
            "predictions": scatter_to_global(weak, self.task.predictions(weak.logits)),
            "ids": scatter_to_global(weak, encode_ids(weak.known_ids + TAKEN)),
        }

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the predictions, and on several ranks of what is remembered."""
        remembered = 4 * unlabeled * (self.averages.top or self.num_classes)
        return 4 * unlabeled * self.num_classes + (remembered if self.recalls else 0)

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step, and keep the predictions of the global batch until `commit`."""
        super().observe(sums, unlabeled_rows)
        self._batch = dict(sums)

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of unlabelled rows that have a target."""
        assert outputs.weak is not None
        assert outputs.weak.positions is not None
        averages, counts = (
            self.looked_up(name, outputs.weak.known_ids, outputs.weak.positions)
            for name in ("averages", "counts")
        )
        known = (counts > 0).float()  # [unlabeled]
        correction = 1 - self.momentum ** counts.clamp(min=1)
        targets = averages / correction[:, None]
        losses = self.task.squared_error(outputs.student_weak[0], targets) * known  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight * self.ramp,
            metrics={"target_rate": known.sum() / outputs.unlabeled_rows},
        )

    def commit(self) -> None:
        """Write the batch's predictions into the table; of a repeated row, the last."""
        super().commit()
        if self.is_finite is None or self.is_finite:
            self._write(self._batch["predictions"], self._batch["ids"])
        self._batch = {}

    def discard(self) -> None:
        """Forget the batch's predictions."""
        super().discard()
        self._batch = {}

    def _write(self, predictions: Tensor, encoded: Tensor) -> None:
        occupied = encoded[:, 0] > 0.5  # else no rank has a row at that position
        ids, positions = last_occurrences(encoded, occupied)
        ids = ids - TAKEN
        moved = self.averages.read(ids).lerp(predictions[positions], 1 - self.momentum)
        self.averages.write(ids, moved, self.rows)
        self.counts.write(ids, self.counts.read(ids) + 1, self.rows)


TemporalEnsemblingConfig = TemporalEnsembling.Config
