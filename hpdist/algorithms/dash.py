"""Dash: rows count if their loss is below a threshold that falls from the labelled loss on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import hard_cross_entropy, sharpened, soft_cross_entropy


class Dash(Algorithm, name="dash"):
    """L = L_x + lambda_u mean_b 1[H(q_b, p(weak(u_b))) <= rho_t] H(q_b, p(strong(u_b))).

    With rho_t = max(C gamma^-k rho, rho_min), where k counts the falls since the warm-up and rho is
    the mean labelled loss over the global batches of the last quarter of the warm-up and of the
    first step after it. The target is q_b = softmax(z(weak(u_b)) / T), or onehot(argmax z) once
    rho_t is rho_min. During the warm-up L = L_x, although the unlabelled rows pass the model.
    Algorithm 1 of the paper, which measures rho once, over labelled rows.
    """

    paper: ClassVar[str] = "Xu et al. 2021, arXiv:2109.00650"
    views: ClassVar[Views] = Views(weak=1, strong=1, labeled_targets=True)
    defaults: ClassVar[str] = "The paper's values; its numbers of steps are shares of its run."

    warmup_steps: int = share_of_run(setting="warmup", share=0.002, ge=0, le=1)
    """Share of the run that trains on labels only; its last quarter measures their loss."""
    decay_steps: int = share_of_run(setting="decay_every", share=0.01, at_least=1, gt=0, le=1)
    """Share of the run between two reductions of the threshold."""
    scale: float = option(default=1.0001, gt=1)
    """The initial threshold, in multiples of the labelled loss (C)."""
    decay: float = option(default=1.27, gt=1)
    """Divisor of the threshold at each reduction (gamma)."""
    min_threshold: float = option(default=0.05, gt=0)
    """The lowest threshold, from which on labels are hard (rho_min)."""
    temperature: float = option(default=0.5, gt=0)
    """Temperature of the soft targets until then (T)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term after the warm-up."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        zero = torch.zeros((), device=device)
        self.state = {
            "step": zero.clone(),  # applied steps
            "labeled_loss": zero.clone(),  # sum over the rows that measure rho
            "labeled_rows": zero.clone(),  # how many they are
        }

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sum of the labelled loss, and labelled rows."""
        assert weak.labeled is not None
        assert weak.labels is not None
        losses = hard_cross_entropy(weak.labeled, weak.labels)  # [labeled]
        return {"labeled_loss": losses.sum(), "labeled_rows": losses.new_tensor(len(losses))}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step, and measure the labelled loss in the steps that do."""
        step = self.state["step"]
        first = self.warmup_steps - self.warmup_steps // 4
        measuring = (step >= first) & (step <= self.warmup_steps)
        self.pending = {
            name: torch.where(measuring, self.state[name] + sums[name], self.state[name])
            for name in ("labeled_loss", "labeled_rows")
        }
        self.pending["step"] = step + 1

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms and the mask rate, which is 0 during the warm-up."""
        assert outputs.weak is not None
        logits = outputs.weak.logits  # [unlabeled, classes]
        threshold = self._threshold()
        soft = sharpened(logits, self.temperature)
        hard = F.one_hot(logits.argmax(dim=-1), logits.shape[1]).float()
        targets = torch.where(threshold <= self.min_threshold, hard, soft)
        started = self.state["step"] >= self.warmup_steps
        mask = ((soft_cross_entropy(logits, targets) <= threshold) & started).float()
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def _threshold(self) -> Tensor:
        """The threshold of this step, rho_t, []."""
        pending = self.pending
        measured = pending["labeled_loss"] / pending["labeled_rows"].clamp(min=1)
        falls = ((self.state["step"] - self.warmup_steps) / self.decay_steps).floor().clamp(min=0)
        return (self.scale * measured * self.decay**-falls).clamp(min=self.min_threshold)


DashConfig = Dash.Config
