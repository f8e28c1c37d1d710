"""Virtual adversarial training: predictions hold in the direction in which they change most."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import LogitsFn, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.data.structures import sent
from hpdist.errors import ConfigError
from hpdist.tasks.base import DIVERGENCE, ENTROPY, Task


class VAT(Ramped, name="vat"):
    """L = L_x + alpha r(t) mean_b KL(p(u_b) || p(u_b + r_b)) + w mean_b H(p(u_b), p(u_b)).

    Equations 5 and 8 of the paper, p(u_b) without gradient in the former. r_b = epsilon g / |g|
    with g the gradient of KL(p(u_b) || p(u_b + xi d)) towards d, which begins as a random unit
    vector and becomes g / |g| after each power iteration (eq. 10 to 12, algorithm 1). u is a weak
    view. Where g is zero or not finite, d stays as it was; the log has the share of such rows. r
    rises linearly from 0 to 1 over the first `ramp_steps` applied steps.

    The directions are found with `torch.autograd.grad` towards them alone, so no parameter's
    gradient is touched and nothing is reduced. Batch normalisation uses the statistics of the
    unlabelled rows in that pass.

    With several labels per row the divergence is that of Bernoulli distributions, mean_c; in
    regression it is the squared error, and there is no entropy.
    """

    paper: ClassVar[str] = "Miyato et al. 2018, arXiv:1704.03976"
    views: ClassVar[Views] = Views(weak=1, needs_gradient_probe=True)
    needs: ClassVar[frozenset[str]] = frozenset({DIVERGENCE})
    shape = "linear"
    defaults: ClassVar[str] = (
        "The values of the benchmark USB except xi; the paper chooses epsilon for each data set."
    )

    epsilon: float = option(default=6.0, gt=0)
    """Length of the perturbation of a row, in the units of the model's input (epsilon)."""
    xi: float = option(default=0.1, gt=0)
    """Length of the step that finds the direction. The paper's 1e-6 is lost in the rounding even of
    fp32; 0.1 is large enough for half precision."""
    power_iterations: int = option(default=1, ge=1)
    """Power iterations, each a forward and a backward (K)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the smoothness term after the ramp (alpha)."""
    entropy_weight: float = option(default=0.06, ge=0)
    """Weight of the entropy of the unlabelled rows' predictions; 0 saves a forward of them."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.4, default=0, ge=0, le=1)
    """Share of the run over which the first weight rises from 0."""

    def set_task(self, task: Task) -> None:
        """Set the task; raises ConfigError if it has no entropy and `entropy_weight` is set."""
        super().set_task(task)
        if self.entropy_weight > 0 and ENTROPY not in task.abilities:
            raise ConfigError(
                f"task.name: {task.name} has no entropy; set algorithm.entropy_weight to 0, or "
                "choose another algorithm"
            )

    def perturb(self, inputs: StudentInputs, weak: WeakOutputs, model: LogitsFn) -> StudentInputs:
        """Add the perturbed rows, and the unperturbed ones if their entropy counts."""
        rows = inputs.weak[0]
        if not rows.is_floating_point():
            raise ConfigError(
                f"VAT perturbs inputs of floating-point numbers, and these are {rows.dtype}"
            )
        numbers = rows[0].numel() if len(rows) else 0
        drawn = sent(inputs.positions.normal("vat", numbers), rows.device)
        direction, _ = _unit(drawn.view(rows.shape), drawn.view(rows.shape))
        lost = rows.new_zeros(len(rows))
        for _ in range(self.power_iterations if len(rows) else 0):
            direction = direction.detach().requires_grad_()
            logits = model(rows + self.xi * direction)
            # Divided by xi, it is of the size of the Jacobian, which half precision can hold.
            divergence = self.task.divergence(weak.logits, logits).sum() / self.xi
            (gradient,) = torch.autograd.grad(divergence, direction)
            direction, lost = _unit(gradient, direction.detach())
        perturbed = (rows + self.epsilon * direction).detach()
        extra_inputs = (perturbed, rows) if self.entropy_weight > 0 else (perturbed,)
        context = {**inputs.context, "lost": lost}
        return replace(inputs, extra_inputs=(*inputs.extra_inputs, *extra_inputs), context=context)

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """All terms, and the share of rows whose direction stayed random."""
        assert outputs.weak is not None
        smoothness = self.task.divergence(
            outputs.weak.logits, outputs.extra_inputs[0]
        )  # [unlabeled]
        extras = {}
        if self.entropy_weight > 0:
            entropies = self.task.entropy(outputs.extra_inputs[1]).sum() / outputs.unlabeled_rows
            extras["entropy_loss"] = self.entropy_weight * entropies
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=smoothness.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight * self.ramp,
            extras=extras,
            metrics={"lost_directions": outputs.context["lost"].sum() / outputs.unlabeled_rows},
        )


VATConfig = VAT.Config


def _unit(rows: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1, or their fallback; and which needed it, fp32 [rows]."""
    flat = rows.float().flatten(1)
    largest = flat.abs().amax(dim=1, keepdim=True) if flat.shape[1] else flat.new_ones(len(flat), 1)
    fits = (largest > 0) & largest.isfinite()
    scaled = flat / largest.where(fits, 1.0)  # so that squares neither overflow nor vanish
    unit = scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1e-30)
    chosen = torch.where(fits, unit, fallback.float().flatten(1))
    return chosen.view(rows.shape), 1 - fits[:, 0].float()
