"""DARP: pseudo-labels are changed as little as possible until their classes have given shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.parts.tables import RowTable, encode_ids, last_occurrences, scatter_to_global
from hpdist.errors import ConfigError

_NEWTON_STEPS = 10  # from the previous solution; each doubles the number of exact digits
_REFINING = 40  # bytes for a row and class: five tensors in fp64 or int64
_SMALL = 1e-6  # for a class that was removed from a row


def _positive(value: list[float] | None) -> list[float] | None:
    if value is not None and min(value) <= 0:
        raise ValueError("must be positive for every class; give a rare one a small number")
    return value


class DARP(AddOn, name="darp"):
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

    Every rank holds two tables, rows by classes, and refines them identically in fp64. For a
    million rows and 100 classes they are 800 MB, and a refinement temporarily takes several times
    that. Checkpoints hold them. A step's predictions reach all ranks with its other sums, as C + 2
    floats for each unlabelled row of the global batch. Once a step the host waits for the ids.
    """

    name: ClassVar[str] = "darp"
    addon_paper: ClassVar[str] = "Kim et al. 2020, arXiv:2007.08844"
    defaults: ClassVar[str] = (
        "The values of the paper's released code; its warm-up is 200 of 500 epochs."
    )

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

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        if not self.base.views.weak:
            raise ConfigError(
                f"addons: darp refines pseudo-labels, and {type(self.base).__name__} makes none "
                "from weak views; leave it out, or choose another algorithm"
            )
        self.remember({"step": torch.zeros((), device=device)})  # applied steps
        self.predictions = RowTable((self.num_classes,), torch.float32, device)
        self.refined = RowTable((self.num_classes,), torch.float32, device)
        self.tables = {"predictions": self.predictions, "refined": self.refined}
        self._batch: dict[str, Tensor] = {}

    def remembered_bytes(self, rows: int) -> int:
        """Count those of the tables, and of a refinement, which holds several in fp64."""
        return super().remembered_bytes(rows) + _REFINING * rows * self.num_classes

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Replace every weak view's logits by log x, where there is an x."""
        refined, known = self._look_up(weak.known_ids)
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
        _, known = self._look_up(outputs.weak.known_ids)
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

    def _look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Refined rows [rows, classes], and which of them exist, bool [rows]."""
        rows = self.refined.read(ids)
        return rows, rows.sum(dim=1) > 0.5

    def _write(self, predictions: Tensor, encoded: Tensor) -> None:
        occupied = predictions.sum(dim=1) > 0.5  # else no rank has a row at that position
        ids, positions = last_occurrences(encoded, occupied)
        self.predictions.write(ids, predictions[positions], self.rows)
        self.refined.reserve(ids, self.rows)

    def _refine(self) -> None:
        table = self.predictions.values
        known_rows = (table.sum(dim=1) > 0.5).nonzero()[:, 0]
        if not len(known_rows):
            return
        probabilities = table[known_rows].double()
        amounts = len(known_rows) * self._shares(probabilities).double()
        found = refined(probabilities, amounts, self.alpha, self.iterations)
        self.refined.load(torch.zeros_like(table).index_copy(0, known_rows, found.float()))

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
    logs = _without_small(probabilities, amounts, alpha).log()
    entropy = -(logs.exp() * logs).sum(dim=1, keepdim=True)  # [rows, 1], 1 / w
    goal = amounts.log()
    nu = torch.zeros_like(amounts)
    for _ in range(iterations):
        rows = logs - torch.logsumexp(logs - nu * entropy, dim=1, keepdim=True)
        for _ in range(_NEWTON_STEPS):
            scores = rows - nu * entropy
            slope = -(scores.softmax(dim=0) * entropy).sum(dim=0)
            nu = nu - (torch.logsumexp(scores, dim=0) - goal) / slope
    return (logs - nu * entropy).softmax(dim=1)


def _without_small(probabilities: Tensor, amounts: Tensor, alpha: float) -> Tensor:
    """Remove a class from rows when others have more of it; scale each class to its amount."""
    order = probabilities.argsort(dim=0, descending=True, stable=True)
    kept = (alpha * amounts).floor().clamp(min=1)  # rows of each class
    positions = torch.arange(len(probabilities), device=probabilities.device)[:, None]
    first = torch.zeros_like(probabilities).scatter(
        0, order, (positions < kept).to(probabilities.dtype)
    )
    chosen = probabilities * first
    chosen = chosen * amounts / chosen.sum(dim=0).clamp(min=_SMALL) + _SMALL
    return chosen / chosen.sum(dim=1, keepdim=True)
