"""DARP: pseudo-labels are changed as little as possible until their classes have given shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor

from hpdist.algorithms.addons.row_memory import RemembersRowsAddOn
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.parts.class_sums import find_near
from hpdist.algorithms.parts.row_tables import ShardedRows
from hpdist.algorithms.parts.tables import encode_ids, last_occurrences, scatter_to_global
from hpdist.errors import ConfigError

_AT_ONCE = 1 << 20  # numbers that are refined at once


def _positive(value: list[float] | None) -> list[float] | None:
    if value is not None and min(value) <= 0:
        raise ValueError("must be positive for every class; give a rare one a small number")
    return value


class DARP(RemembersRowsAddOn, name="darp"):
    """Targets are the rows x_n that minimise sum_n KL(x_n || q_n) / H(q_n), given classes' sums.

    q_n is the latest prediction for row n. Each x_n sums to 1, and all rows together have M_c of
    class c, its share of the rows. First, a class is removed from all rows but the alpha M_c that
    have most of it, and q_n^c is multiplied by M_c / sum of those; rows sum to 1 again. The minimum
    is found by coordinate ascent of the dual: x_n^c ~ q_n^c exp(-nu_c H(q_n)), each round first
    every row's sum, then every class's by Newton's method, here of its logarithm. After the last
    round rows sum to 1, and classes nearly to M_c. (Section 3 and algorithm 1 of the paper, and its
    released code.)

    All rows are those seen so far. After the warm-up they are refined every `every` applied steps,
    and a row that was in the last refinement has its x_n as target, in place of each weak view; the
    paper's refinement includes the batch of the same step. With several weak views q_n is their
    mean. The inner algorithm sharpens, aligns or thresholds x_n as it would the prediction.

    Each rank holds two tables of the rows that it owns, rows by classes, and refines them in fp64,
    some rows at a time: for a million rows and 100 classes 800 MB / ranks. With `top` it is 12
    bytes or 16 for each of so many classes of a row, and the others are taken for 0. Checkpoints
    hold them. A step's predictions reach all ranks with its other sums, as C + 2 floats for each
    unlabelled row of the global batch; on several ranks two more sums go before, the ids of these
    rows and their x_n. A refinement sums counts of every class for each bit of a probability and of
    an id, and for each of 10 Newton steps a round 3 C numbers. Once a step the host waits for the
    ids.
    """

    name: ClassVar[str] = "darp"
    addon_paper: ClassVar[str] = "Kim et al. 2020, arXiv:2007.08844"
    defaults: ClassVar[str] = (
        "The values of the paper's released code; its warm-up is 200 of 500 epochs."
    )

    looks_up: ClassVar[tuple[str, ...]] = ("refined",)
    num_classes: int = argument(kw_only=False)
    warmup_steps: int = share_of_run(setting="warmup", share=0.4, default=0, ge=0, le=1)
    """Share of the run before the first refinement."""
    every: int = option(default=10, ge=1)
    """Applied steps between refinements."""
    alpha: float = option(default=2.0, gt=0)
    """A class keeps its likeliest rows, up to this many times its target (delta in the paper)."""
    iterations: int = option(default=10, ge=1)
    """Rounds of coordinate ascent in a refinement (T)."""
    distribution: list[float] | None = option(
        default=None,
        annotation=Annotated[list[float] | None, AfterValidator(_positive)],
        min_length=2,
    )
    """How the unlabelled rows divide among the classes, as numbers in any unit; by default like the
    labelled rows."""
    top: int | None = option(default=None, ge=1)
    """Keep only so many of a row's probabilities, the largest; by default those of all classes."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        if not self.base.views.weak:
            raise ConfigError(
                f"addons: darp refines pseudo-labels, and {type(self.base).__name__} makes none "
                "from weak views; leave it out, or choose another algorithm"
            )
        self.remember({"step": torch.zeros((), device=device)})  # applied steps
        self.predictions, self.refined = (
            ShardedRows(self.num_classes, torch.float32, device, self.top) for _ in range(2)
        )
        self.remembered = {"predictions": self.predictions, "refined": self.refined}
        self._batch: dict[str, Tensor] = {}

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the predictions, and on several ranks of x_n, with the inner algorithm."""
        numbers = self.num_classes + (self.refined.top or self.num_classes) * self.recalls
        return super().summed_bytes(labeled, unlabeled) + 4 * unlabeled * numbers

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Replace every weak view's logits by log x, where there is an x."""
        refined, known = self._look_up(weak)
        logits = refined.clamp(min=torch.finfo(torch.float32).tiny).log()
        return replace(
            weak,
            logits=torch.where(known[:, None], logits, weak.logits),
            others=tuple(torch.where(known[:, None], logits, view) for view in weak.others),
        )

    def own_statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Each row's prediction at its position in the global batch; the sum is a gather."""
        self._shares(weak.logits)  # so that missing counts raise in the first step
        probabilities = torch.stack([view.softmax(dim=-1) for view in (weak.logits, *weak.others)])
        return {
            "predictions": scatter_to_global(weak, probabilities.mean(dim=0)),
            "ids": scatter_to_global(weak, encode_ids(weak.known_ids)),
        }

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Count the step, and keep the predictions of the global batch until `commit`."""
        self._batch = dict(sums)
        return {"step": self.own["step"] + 1}

    def add(self, outputs: StudentOutputs, terms: LossTerms) -> LossTerms:
        """The inner algorithm's terms, and the share of unlabelled rows with refined targets."""
        assert outputs.weak is not None
        _, known = self._look_up(outputs.weak)
        rate = known.float().sum() / outputs.unlabeled_rows
        return replace(terms, metrics={**terms.metrics, "refined_rate": rate})

    def commit(self) -> None:
        """Write the batch's predictions into the table, and refine it if it is due."""
        super().commit()
        if self._batch and (self.is_finite is None or self.is_finite):
            self._write(self._batch["predictions"], self._batch["ids"])
            since = int(self.own["step"]) - self.warmup_steps
            if since >= 0 and since % self.every == 0:
                self._refine()
        self._batch = {}

    def discard(self) -> None:
        """Forget the batch's predictions."""
        super().discard()
        self._batch = {}

    def _look_up(self, weak: WeakOutputs) -> tuple[Tensor, Tensor]:
        """Refined rows [rows, classes], and which of them exist, bool [rows]."""
        rows = self.looked_up("refined", weak.known_ids, weak.positions)
        return rows, rows.sum(dim=1) > 0

    def _write(self, predictions: Tensor, encoded: Tensor) -> None:
        occupied = predictions.sum(dim=1) > 0.5  # else no rank has a row at that position
        ids, positions = last_occurrences(encoded, occupied)
        self.predictions.write(ids, predictions[positions], self.rows)
        self.refined.cover(ids, self.rows)

    def _refine(self) -> None:
        """Refine the rows seen so far. Collective, where ranks hold parts of them."""
        ranks, shares = self.ranks_of_rows(), self._shares(self._batch["predictions"]).double()
        own = torch.tensor(sum(len(ids) for ids, _ in self._blocks()))
        count = ranks.sum(own.to(shares))
        if not count:
            return
        options = (self.alpha, self.iterations, self.predictions.rows, torch.float32)
        near = find_near(self._blocks, count * shares, *options, ranks)
        for block in self._blocks():
            self.refined.write(block[0], near.rows(*block).float())

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows that have a prediction: ids [rows], and fp32 [rows, classes]."""
        size = max(1, _AT_ONCE // self.num_classes)
        for ids in self.predictions.own_ids.split(size):
            rows = self.predictions.read(ids)
            known = rows.sum(dim=1) > 0
            if known.any():
                yield ids[known], rows[known]

    def _shares(self, like: Tensor) -> Tensor:
        """How the rows divide among the classes, fp32 [classes], summing to 1."""
        classes = like.shape[1]
        if self.distribution is None:
            counts = self.required_counts(like).clamp(min=0.5)
        elif len(self.distribution) == classes:
            counts = torch.tensor(self.distribution, device=like.device)
        else:
            raise ConfigError(
                f"addons: darp.distribution: {len(self.distribution)} numbers for {classes} "
                "classes; give one for each"
            )
        return counts / counts.sum()


DARPConfig = DARP.Config


def refined(probabilities: Tensor, amounts: Tensor, alpha: float, iterations: int) -> Tensor:
    """Give rows near `probabilities` that sum to 1, with about the given sum of every class.

    Args:
        probabilities: Probabilities, fp64 [rows, classes].
        amounts: Of each class, fp64 [classes], positive, summing to the number of rows.
        alpha: Keeps a class only in this many times its amount of rows.
        iterations: Rounds of coordinate ascent.
    """
    rows, dtype = len(probabilities), probabilities.dtype
    block = torch.arange(rows, device=probabilities.device), probabilities
    return find_near(lambda: [block], amounts, alpha, iterations, rows, dtype).rows(*block)
