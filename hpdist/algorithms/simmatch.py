"""SimMatch: views agree on their class, and on the labelled rows that they are similar to."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import aligned, uniform_prior
from hpdist.algorithms.parts.banks import enqueued, log_shares, mean_of, with_mean
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.projections import projection
from hpdist.algorithms.parts.tables import encode_ids, ids_of, scatter_to_global
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import soft_cross_entropy

_HEAD = "projection"
_TINY = torch.finfo(torch.float32).tiny
_AT_ONCE = 1024  # classes that the bank's labels are written out for


class SimMatch(Algorithm, name="simmatch"):
    """L = L_x + lambda_u mean_b m_b H(q_b, p(s_b)) + lambda_in mean_b H(t'_b, t(s_b)).

    With m_b = 1[max q_b >= tau]. p_b = p(w_b) of the weak view is divided by the mean of p over the
    last steps, this one with them, and made to sum to 1. With z an embedding of length 1 and (z_k,
    y_k) the labelled rows in the bank, t(v)_k = softmax_k(z(v) z_k / t). Aggregated: q_bc = alpha
    p_bc + (1 - alpha) sum of t(w_b)_k over y_k = c. Unfolded: t'_bk = t(w_b)_k p_b,y_k, made to sum
    to 1. Section 3 of the paper. Outputs of weak views are the teacher's, and so are the z_k.

    The bank holds each labelled row once, as it was when last seen in the steps before. Empty
    slots are ignored; while all slots are empty, q_b = p_b and there is no third term.
    """

    paper: ClassVar[str] = "Zheng et al. 2022, arXiv:2203.06915"
    views: ClassVar[Views] = Views(weak=1, strong=1, labeled_targets=True, teacher=True)
    head_names = (_HEAD,)
    defaults: ClassVar[str] = (
        "The paper's values for CIFAR-10, except the number of steps that are aligned.\n"
        "\n"
        "Their number is the default of the benchmark USB, whose configs for CIFAR have 32."
    )

    num_classes: int = argument(kw_only=False)
    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the pseudo-labels (lambda_u)."""
    similarity_weight: float = option(default=1.0, ge=0)
    """Weight of the agreement on labelled rows (lambda_in)."""
    smoothing: float = option(default=0.9, ge=0, le=1)
    """Weight of a row's own prediction against the labels of similar rows (alpha)."""
    temperature: float = option(default=0.1, gt=0)
    """Temperature of the similarity of embeddings (t)."""
    width: int = option(default=128, gt=0)
    """Numbers in an embedding."""
    bank: int = option(default=4096, gt=0)
    """Labelled rows that are remembered; if there are more, the newest (K)."""
    alignment_steps: int = option(default=256, gt=0)
    """Steps over which the mean prediction is made uniform."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.state = {
            "embeddings": torch.zeros(self.bank, self.width, device=device),
            "labels": torch.zeros(self.bank, device=device),  # + 1; 0 is an empty slot
            "ids": torch.zeros(self.bank, 2, device=device),  # encoded
            "means": torch.zeros(self.alignment_steps, self.num_classes, device=device),
        }

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The projection head that makes embeddings."""
        return {_HEAD: projection(features, self.width)}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """The sum of predictions, and the data of each labelled row at its position."""
        assert weak.labels is not None
        return {
            "probabilities": weak.probabilities.sum(dim=0),
            "embeddings": scatter_to_global(weak, weak.heads[_HEAD][1], labeled=True),
            "labels": scatter_to_global(weak, weak.labels + 1, labeled=True),
            "ids": scatter_to_global(weak, encode_ids(weak.known_labeled_ids), labeled=True),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Put the batch's mean prediction and its labelled rows into the banks."""
        means = with_mean(self.state["means"], sums["probabilities"] / unlabeled_rows)
        names = ("embeddings", "labels", "ids")
        old, new = [self.state[name] for name in names], [sums[name] for name in names]
        ids = ids_of(sums["ids"])
        again = _occurs_again(ids)
        kept = (self.state["labels"] > 0) & ~torch.isin(ids_of(self.state["ids"]), ids)
        bank = enqueued(old, kept, new, ~again)
        self.pending = {**dict(zip(names, bank, strict=True)), "means": means}

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The three terms, and the share of unlabelled rows that passed the threshold."""
        weak = outputs.weak
        assert weak is not None
        prior = uniform_prior(self.num_classes, weak.logits.device)
        predictions = aligned(weak.logits, mean_of(self.pending["means"]), prior)
        known = self.state["labels"] > 0  # [bank]
        labels = (self.state["labels"].long() - 1).clamp(min=0)
        near = self._similarities(weak.heads[_HEAD][0])  # [unlabeled, bank]
        shares = self._of_classes(log_shares(near, known).exp(), labels)
        smoothed = self.smoothing * predictions + (1 - self.smoothing) * shares
        targets = torch.where(known.any(), smoothed, predictions)  # [unlabeled, classes]
        mask = (targets.amax(dim=1) >= self.threshold).float()
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask
        unfolded = log_shares(near + predictions.clamp(min=_TINY).log()[:, labels], known).exp()
        strong_log_shares = log_shares(self._similarities(outputs.heads[_HEAD].strong[0]), known)
        similarity = -(unfolded * strong_log_shares).sum() * known.any()
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            extras={
                "similarity_loss": self.similarity_weight * similarity / outputs.unlabeled_rows
            },
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def _of_classes(self, shares: Tensor, labels: Tensor) -> Tensor:
        """Add up shares [rows, bank] by the labels [bank], to [rows, classes].

        It is a product, as scattered sums are in no fixed order on a GPU, of some classes at once,
        as there may be more of them than rows in the bank.
        """
        numbers = torch.arange(self.num_classes, device=labels.device)
        parts = [shares @ (labels[:, None] == some).float() for some in numbers.split(_AT_ONCE)]
        return torch.cat(parts, dim=1)

    def _similarities(self, embeddings: Tensor) -> Tensor:
        """Return the similarities of embeddings [rows, width] to the bank's, [rows, bank]."""
        return embeddings @ self.state["embeddings"].T / self.temperature


def _occurs_again(ids: Tensor) -> Tensor:
    """Whether each id occurs again later in a batch, bool [rows]; in memory of O(rows)."""
    order = ids.argsort(stable=True)
    followed = ids[order][:-1] == ids[order][1:]
    return torch.zeros_like(ids, dtype=torch.bool).index_copy(0, order[:-1], followed)


SimMatchConfig = SimMatch.Config
