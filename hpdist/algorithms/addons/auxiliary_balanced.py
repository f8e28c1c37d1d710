"""ABC: a second classifier, trained on a balanced part of the rows, gives the predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import HeadOutputs, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.projections import linear
from hpdist.algorithms.parts.ramps import linear as share_done
from hpdist.data.structures import sent
from hpdist.tasks.losses import confident, hard_cross_entropy, soft_cross_entropy

_VIEWS = 2  # strong views in the paper's loss


class ABC(AddOn, name="abc"):
    """Adds mean_b M(x_b) H(y_b, p(x_b)) + mean_b M(u_b) 1[max q_b >= tau] sum_k H(q_b, p(s_k)).

    Here p is a linear head on the model's features, and q_b its own prediction on the first weak
    view, without gradient. M is 1 or 0, drawn for each row: for a labelled row 1 with probability
    r_y = min_c N_c / N_y, where N_c are the labelled rows of class c; for an unlabelled one with
    1 - (e/E) (1 - r_y), y = argmax q_b, e of E steps applied before (section 3 of the paper). A
    class without labelled rows has r = 1. s_k are the first two strong views, or the only one where
    the inner algorithm has no more. The head's outputs are the predictions after training. Its
    gradient also trains the model below it.

    If the inner algorithm lacks a weak or a strong view, the head has one that the inner algorithm
    does not see. If it mixes rows, the head sees the labelled rows and one strong view unmixed, in
    further forwards. If its targets come from the teacher, so does q.
    """

    name: ClassVar[str] = "abc"
    addon_paper: ClassVar[str] = "Lee et al. 2021, arXiv:2110.10368"
    defaults: ClassVar[str] = "The paper's value."

    num_classes: int = argument(kw_only=False)
    steps: int = argument(default=1)
    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that the second classifier's own prediction needs (tau)."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.remember({"step": torch.zeros((), device=device)})  # applied steps
        weak, strong = max(self.base.views.weak, 1), max(self.base.views.strong, 1)
        self.views = replace(self.base.views, weak=weak, strong=strong)  # type: ignore[misc]
        self.head_names = (*self.base.head_names, self.name)
        self.predicts = self.name
        self._mixes = _mixes(self.base)
        self.own_extra_inputs = 2 if self._mixes else int(self.base.views.strong == 0)

    def own_heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The second classifier."""
        return {self.name: linear(features, self.num_classes)}

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Count the step."""
        return {"step": self.own["step"] + 1}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Run the inner algorithm's probe, if it needs weak views."""
        return super().statistics(weak) if self.base.views.weak else {}

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Mix with the views that the inner algorithm needs, then add the head's own."""
        views = self.base.views
        strong = inputs.strong[: views.strong]
        inner = replace(inputs, weak=inputs.weak[: views.weak], strong=strong)
        mixed = super().mix(inner, weak)
        own = (inputs.labeled, inputs.strong[0])[2 - self.own_extra_inputs :]
        return replace(mixed, extra_inputs=(*mixed.extra_inputs, *own))

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Remove targets that the inner algorithm did not ask for."""
        return outputs if self.base.views.weak else replace(outputs, weak=None)

    def add(self, outputs: StudentOutputs, terms: LossTerms) -> LossTerms:
        """Two more terms, and the share of unlabelled rows that count in the second."""
        weak = outputs.weak
        assert weak is not None
        assert weak.positions is not None
        labeled, strong = self._rows(outputs.heads[self.name])
        ratio = self._ratio(labeled)  # [classes]
        drawn = sent(weak.positions.noise("abc", 1, labeled=True)[:, 0], labeled.device)
        kept = (drawn < ratio[outputs.labels]).float()  # [labeled]
        losses = hard_cross_entropy(labeled, outputs.labels) * kept
        targets = weak.heads[self.name][0].softmax(dim=-1)  # [unlabeled, classes]
        mask, classes = confident(targets, self.threshold)
        done = share_done(self.own["step"], self.steps)
        drawn = sent(weak.positions.noise("abc", 1)[:, 0], labeled.device)
        mask = mask * (drawn < 1 - done * (1 - ratio[classes])).float()
        u_losses = sum((soft_cross_entropy(view, targets) * mask).sum() for view in strong)
        extras = {
            "abc_supervised_loss": losses.sum() / outputs.labeled_rows,
            "abc_unsupervised_loss": u_losses / outputs.unlabeled_rows,
        }
        metrics = {"abc_mask_rate": mask.sum() / outputs.unlabeled_rows}
        return replace(
            terms, extras={**terms.extras, **extras}, metrics={**terms.metrics, **metrics}
        )

    def _rows(self, head: HeadOutputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The head's outputs for labelled rows and strong views, all unmixed."""
        if not self.own_extra_inputs:
            return head.labeled, head.strong[:_VIEWS]
        own = head.extra_inputs[-self.own_extra_inputs :]
        return (own[0] if self._mixes else head.labeled), own[-1:]

    def _ratio(self, like: Tensor) -> Tensor:
        """The smallest class's number of labelled rows over each class's, [classes]."""
        counts = self.required_counts(like)
        smallest = counts.where(counts > 0, torch.inf).min()
        return smallest / torch.maximum(counts, smallest)


ABCConfig = ABC.Config


def _mixes(algorithm: Algorithm) -> bool:
    """Whether the student's rows may be mixtures."""
    while isinstance(algorithm, AddOn):
        algorithm = algorithm.base
    return type(algorithm).mix is not Algorithm.mix
