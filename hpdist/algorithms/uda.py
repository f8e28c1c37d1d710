"""UDA: sharpened soft targets for confident rows, and gradual release of the labelled ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import REQUIRED, argument, option
from hpdist.algorithms.parts import ramps
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views
from hpdist.errors import ConfigError
from hpdist.tasks.losses import hard_cross_entropy, sharpened, soft_cross_entropy


class UDA(PseudoLabeling, name="uda"):
    """L = L_x + lambda mean_b 1[max p(weak(u_b)) > beta] H(q_b, p(strong(u_b))).

    Here q_b = softmax(z(weak(u_b)) / tau) of the logits z.
    """

    paper: ClassVar[str] = "Xie et al. 2020, arXiv:1904.12848"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = "The paper's values for images."

    temperature: float = option(default=0.4, gt=0)
    """Temperature of the targets (tau)."""
    threshold: float = option(default=0.8, ge=0, le=1)
    """Confidence, before sharpening, that a target needs (beta)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term (lambda)."""
    annealing: ramps.Schedule = option(default="off")
    """How the confidence up to which labelled rows count rises from 1/C to 1 (training signal
    annealing): `log` for many labels, `exp` for few. Any value but `off` costs a second pass over
    the labelled rows."""

    @classmethod
    def from_config(
        cls, config: Any, num_classes: int, device: torch.device | str, steps: int
    ) -> UDA:
        """Make the algorithm, or its annealing variant."""
        kind = UDA if config.annealing == "off" else AnnealedUDA
        run = {"num_classes": num_classes, "device": device, "steps": steps}
        return kind(**kind.arguments(config, **run))

    def start(self, device: torch.device | str) -> None:
        """Refuse annealing, which only the subclass implements."""
        super().start(device)
        if self.annealing != "off" and not isinstance(self, AnnealedUDA):
            raise ConfigError(
                f"UDA(annealing={self.annealing!r}) needs the length of the run; use "
                f"hpdist.algorithms.AnnealedUDA(num_classes, annealing={self.annealing!r}, steps=…)"
            )

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms and the mask rate."""
        assert outputs.weak is not None
        confidence = outputs.weak.probabilities.amax(dim=-1)  # [unlabeled]
        mask = (confidence > self.threshold).float()
        targets = sharpened(outputs.weak.logits, self.temperature)
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask
        return self.burned_in(
            LossTerms(
                supervised=self._supervised(outputs),
                unsupervised=losses.sum() / outputs.unlabeled_rows,
                unsupervised_weight=self.unsupervised_weight,
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )

    def _supervised(self, outputs: StudentOutputs) -> Tensor:
        return supervised_loss(outputs)


class AnnealedUDA(UDA):
    """UDA whose labelled rows count only up to a confidence that rises over the run.

    L_x = sum_b k_b H(y_b, p(weak(x_b))) / sum_b k_b, k_b = 1[p(weak(x_b))_y_b <= eta_t], both sums
    over the labelled global batch, eta_t = alpha_t (1 - 1/C) + 1/C.
    """

    views: ClassVar[Views] = Views(weak=1, strong=1, labeled_targets=True)

    num_classes: int = argument(kw_only=False)
    steps: int = argument()
    annealing: ramps.Schedule = option(default=REQUIRED)

    def start(self, device: torch.device | str) -> None:
        """Make the count of applied steps, on `device`."""
        super().start(device)
        self.state["step"] = torch.zeros((), device=device)
        self._kept = torch.ones((), device=device)  # labelled rows of this global batch that count

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """The number of labelled rows that count."""
        return {"kept": self._keep(weak).sum()}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step."""
        self.pending = {"step": self.state["step"] + 1}
        self._kept = sums["kept"].clamp(min=1)

    def _keep(self, weak: WeakOutputs) -> Tensor:
        """Which labelled rows count, fp32 [labeled]."""
        assert weak.labeled is not None
        assert weak.labels is not None
        threshold = ramps.annealed_threshold(
            self.annealing, self.state["step"], self.steps, self.num_classes
        )
        probabilities = weak.labeled.softmax(dim=-1).gather(1, weak.labels[:, None])[:, 0]
        return (probabilities <= threshold).float()

    def _supervised(self, outputs: StudentOutputs) -> Tensor:
        assert outputs.weak is not None
        losses = hard_cross_entropy(outputs.labeled, outputs.labels)  # [labeled]
        return (losses * self._keep(outputs.weak)).sum() / self._kept


UDAConfig = UDA.Config
