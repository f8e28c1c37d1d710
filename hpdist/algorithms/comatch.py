"""CoMatch: pseudo-labels smoothed by a memory, and a graph of them that trains the embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import aligned, uniform_prior
from hpdist.algorithms.parts.banks import enqueued, in_use, log_shares, mean_of, with_mean
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.projections import projection
from hpdist.algorithms.parts.tables import scatter_to_global
from hpdist.algorithms.view_request import Views
from hpdist.data.structures import sent
from hpdist.tasks.losses import soft_cross_entropy

_HEAD = "projection"
_TINY = torch.finfo(torch.float32).tiny
_AT_ONCE = 2048  # rows of the graph that are held
_COPIES = 5  # of [unlabeled, classes] at once: p, aligned, neighbours', smoothed, the bank's new


class CoMatch(Algorithm, name="comatch"):
    """L = L_x + lambda_cls mean_b 1[max q_b >= tau] H(q_b, p(s_b)) + lambda_ctr L_ctr.

    p_b = p(weak(u_b)) is divided by the mean of p over the last steps, this one with them, and made
    to sum to 1. With z an embedding of length 1 and (z_k, p_k) the rows in the bank, q_b = alpha
    p_b + (1 - alpha) sum_k softmax_k(z_b z_k / t) p_k. Graph: W_bj = q_b q_j where that is at least
    T, else 0, W_bb = 1, each row made to sum to 1. L_ctr = -mean_b sum_j W_bj log softmax_j(z_b
    z'_j / t), z of the first strong view s and z' of the second. Sections 3.2 and 3.3 of the paper.

    The bank holds the newest rows of the steps before: z of weak views, with p_b of unlabelled rows
    and labels of labelled ones. Empty slots are ignored; while all slots are empty, q_b = p_b. The
    graph is of the global batch: each rank computes all of it, and all of the q.

    So a rank holds, and a step reduces, C numbers for each unlabelled row of the global batch, and
    the bank has C for each slot. Of the graph, rows by rows, it holds a part at a time.
    """

    paper: ClassVar[str] = "Li, Xiong and Hoi 2021, arXiv:2011.11183"
    head_names = (_HEAD,)
    defaults: ClassVar[str] = (
        "The paper's values for CIFAR-10; its bank holds five batches of 512 rows."
    )

    num_classes: int = argument(kw_only=False)
    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the pseudo-labels (lambda_cls)."""
    contrast_weight: float = option(default=1.0, ge=0)
    """Weight of the graph (lambda_ctr); 0 leaves it out, with the second strong view."""
    smoothing: float = option(default=0.9, ge=0, le=1)
    """Weight of a row's own prediction against those of its neighbours in the bank (alpha)."""
    temperature: float = option(default=0.2, gt=0)
    """Temperature of the similarity of embeddings (t)."""
    graph_threshold: float = option(default=0.8, ge=0, le=1)
    """Similarity of two rows' pseudo-labels that makes them neighbours in the graph (T)."""
    width: int = option(default=64, gt=0)
    """Numbers in an embedding."""
    bank: int = option(default=2560, gt=0)
    """Rows, labelled and unlabelled, that the memory holds (K)."""
    alignment_steps: int = option(default=32, gt=0)
    """Steps over which the mean prediction is made uniform."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.views = Views(  # type: ignore[misc]  # the number of views is an option
            weak=1, strong=2 if self.contrast_weight > 0 else 1, labeled_targets=True
        )
        self.state = {
            "embeddings": torch.zeros(self.bank, self.width, device=device),
            "targets": torch.zeros(self.bank, self.num_classes, device=device),
            "means": torch.zeros(self.alignment_steps, self.num_classes, device=device),
        }
        # q of the global batch, 0 if unusable
        self._pseudo_labels = torch.zeros(0, self.num_classes)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The projection head that makes embeddings."""
        return {_HEAD: projection(features, self.width)}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Predictions or labels, and embeddings, at each row's position in the global batch."""
        assert weak.labels is not None
        unlabeled, labeled = weak.heads[_HEAD]
        return {
            "probabilities": scatter_to_global(weak, weak.probabilities),
            "embeddings": scatter_to_global(weak, unlabeled),
            "labels": scatter_to_global(weak, weak.labels + 1, labeled=True),
            "labeled_embeddings": scatter_to_global(weak, labeled, labeled=True),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Make the global batch's pseudo-labels with the bank, then add its rows to the bank."""
        probabilities = sums["probabilities"]
        usable = in_use(probabilities)
        means = with_mean(self.state["means"], probabilities.sum(dim=0) / unlabeled_rows)
        prior = uniform_prior(self.num_classes, means.device)
        even = aligned(probabilities.clamp(min=_TINY).log(), mean_of(means), prior)
        labels = sums["labels"].round().long()  # + 1; 0 is no row
        one_hot = F.one_hot((labels - 1).clamp(min=0), self.num_classes).float()
        self._pseudo_labels = self._smoothed(even, sums["embeddings"]) * usable[:, None]
        embeddings, targets = enqueued(
            [self.state["embeddings"], self.state["targets"]],
            in_use(self.state["targets"]),
            [
                torch.cat([sums["embeddings"], sums["labeled_embeddings"]]),
                torch.cat([even, one_hot]),
            ],
            torch.cat([usable, labels > 0]),
        )
        self.pending = {"embeddings": embeddings, "targets": targets, "means": means}

    @property
    def uses_student_statistics(self) -> bool:
        """Whether there is a graph."""
        return self.contrast_weight > 0

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """Embeddings of both strong views, at their rows' positions in the global batch."""
        if not self.uses_student_statistics:
            return {}
        assert outputs.weak is not None
        first, second = outputs.heads[_HEAD].strong
        return {
            "first": scatter_to_global(outputs.weak, first),
            "second": scatter_to_global(outputs.weak, second),
        }

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The three terms, and the share of unlabelled rows that passed the threshold."""
        assert outputs.weak is not None
        assert outputs.weak.positions is not None
        at = sent(outputs.weak.positions.unlabeled, self._pseudo_labels.device)
        targets = self._pseudo_labels[at]  # [unlabeled, classes]
        mask = (targets.amax(dim=1) >= self.threshold).float()
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask
        graph = {}
        if self.uses_student_statistics:
            contrast = self._contrast(student_sums) / outputs.unlabeled_rows
            graph["contrastive_loss"] = self.contrast_weight * contrast
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            global_extras=graph,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def _smoothed(self, probabilities: Tensor, embeddings: Tensor) -> Tensor:
        """Predictions [rows, classes] smoothed with those of similar rows in the bank."""
        bank, targets = self.state["embeddings"], self.state["targets"]
        shares = log_shares(embeddings @ bank.T / self.temperature, in_use(targets)).exp()
        mixed = self.smoothing * probabilities + (1 - self.smoothing) * (shares @ targets)
        return torch.where(in_use(targets).any(), mixed, probabilities)

    def _contrast(self, sums: Sums) -> Tensor:
        """The graph's loss, summed over the rows of the global batch."""
        first, second = sums["first"], sums["second"]
        if len(first) <= _AT_ONCE:
            return self._contrast_of(first, second, self._pseudo_labels, 0)
        parts = zip(first.split(_AT_ONCE), self._pseudo_labels.split(_AT_ONCE), strict=True)
        found = [
            checkpoint(self._contrast_of, part, second, own, at * _AT_ONCE, use_reentrant=False)
            for at, (part, own) in enumerate(parts)
        ]
        return torch.stack(found).sum()

    def _contrast_of(self, first: Tensor, second: Tensor, own: Tensor, start: int) -> Tensor:
        """The loss of those rows of the graph that begin at `start`, [rows, batch] each."""
        usable = in_use(self._pseudo_labels)
        itself = torch.arange(start, start + len(own), device=own.device)[:, None]
        graph = (own @ self._pseudo_labels.T).scatter(1, itself, 1.0)
        graph = graph * (graph >= self.graph_threshold)
        graph = graph / graph.sum(dim=1, keepdim=True)
        logs = log_shares(first @ second.T / self.temperature, usable)
        return -((graph * logs).sum(dim=1) * usable[start : start + len(own)]).sum()

    def batch_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count what a rank holds of the whole global batch at once: several copies of its q."""
        rows = _COPIES * unlabeled + 2 * (labeled + self.bank)
        graph = _COPIES * unlabeled * min(unlabeled, _AT_ONCE) if self.contrast_weight > 0 else 0
        return 4 * (rows * self.num_classes + graph)

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the predictions: every rank needs all of them for the graph and the bank.

        Only so many of a row's, the largest, would make another graph.
        """
        return 4 * unlabeled * self.num_classes


CoMatchConfig = CoMatch.Config
