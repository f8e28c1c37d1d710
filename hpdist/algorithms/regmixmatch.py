"""RegMixMatch: FreeMatch, and each unlabelled row mixed with one that the model is certain of."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import (
    AlgorithmConfig,
    LossTerms,
    Places,
    StudentInputs,
    StudentOutputs,
    Sums,
    Views,
    WeakOutputs,
)
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.mixing import BETA_NUMBERS, beta, group_of
from hpdist.algorithms.resizemix import resize_mix
from hpdist.algorithms.targets import soft_cross_entropy, squared_error

_SIDES = (0.1, 0.8)  # of a pasted box, as shares of the image's


class RegMixMatchConfig(AlgorithmConfig):
    """The values of the paper's released configs for CIFAR-10."""

    name: Literal["regmixmatch"] = "regmixmatch"
    momentum: float = Field(0.999, ge=0, lt=1)
    """Of FreeMatch's moving averages."""
    unsupervised_weight: float = Field(1.0, ge=0)
    """Weight of FreeMatch's unsupervised term."""
    fairness_weight: float = Field(0.01, ge=0)
    """Weight of FreeMatch's fairness term; 0 saves one small collective a step."""
    max_threshold: float = Field(1.0, gt=0, le=1)
    """Upper bound of FreeMatch's global threshold."""
    confident: float = Field(0.999, ge=0, le=1)
    """Confidence from which a row is mixed with others as certain as itself (tau_m)."""
    high_alpha: float = Field(1.0, gt=0)
    """Of the Beta distribution that the mixture of a confident row is drawn from."""
    low_alpha: float = Field(16.0, gt=0)
    """The same for the other rows."""
    same_class: float = Field(0.5, ge=0, le=1)
    """Chance that the partner of a row that is not confident is one of its likeliest class."""
    high_weight: float = Field(1.0, ge=0)
    """Weight of the term of mixed confident rows (SRM)."""
    low_weight: float = Field(1.0, ge=0)
    """Weight of the term of the other mixed rows (CAM)."""
    labeled_partners: bool = False
    """Whether labelled rows are partners too."""
    groups: int = Field(8, ge=1)
    """Parts of the global batch within which rows are mixed: ranks times micro-batches must divide
    them, and they the batch."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> RegMixMatch:
        """Make the algorithm, its state on `device`."""
        options = self.model_dump(exclude={"name"})
        return RegMixMatch(num_classes, **options, device=device)


class RegMixMatch(FreeMatch):
    """FreeMatch's loss, plus w_h L_SRM + w_l L_CAM of one mixture per unlabelled row.

    With p_b of the weak view of u_b and y_b = argmax p_b, a row is confident if max p_b >= tau_m.
    The strong view of every row is mixed with that of a confident one v, own share l:

    L_SRM = mean_b [u_b confident] H(l onehot(y_b) + (1 - l) onehot(y_v), p(mix_b)),
    L_CAM = mean_b [not confident] (max p_b)^3 mean_c (l p_b + (1 - l) onehot(y_v) - p(mix_b))_c^2.

    v is another row of the same group of the global batch, drawn anew for each row. If u_b is not
    confident, v is of class y_b with a chance of `same_class`, where there is such a row. A row
    that has no partner counts 0. Labelled rows can be partners as they are seen, in their weak
    view. Images [rows, C, H, W] are mixed by ResizeMix: v, cut to the middle 0.9, shrunk to the
    share 0.1 + 0.7 sqrt(b) of its sides and pasted at a random place, with b ~ Beta(alpha, alpha)
    and l the area left; anything else by Mixup, u l + v (1 - l) with l ~ Beta(alpha, alpha).

    Other than in the released code, both means are over the whole unlabelled batch (there, CAM's is
    over the rows that are not confident), draws are each row's own, and labelled rows are partners
    only if so asked (there always for CAM; for SRM with 100 or more labels per class).
    """

    paper: ClassVar[str] = "Han et al. 2025, arXiv:2412.10741"
    views: ClassVar[Views] = Views(weak=1, strong=1, inputs_need_targets=True)
    groups: int

    def __init__(
        self,
        num_classes: int,
        *,
        momentum: float = 0.999,
        unsupervised_weight: float = 1.0,
        fairness_weight: float = 0.01,
        max_threshold: float = 1.0,
        confident: float = 0.999,
        high_alpha: float = 1.0,
        low_alpha: float = 16.0,
        same_class: float = 0.5,
        high_weight: float = 1.0,
        low_weight: float = 1.0,
        labeled_partners: bool = False,
        groups: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_classes,
            momentum=momentum,
            unsupervised_weight=unsupervised_weight,
            fairness_weight=fairness_weight,
            max_threshold=max_threshold,
            device=device,
        )
        self.confident = confident
        self.high_alpha = high_alpha
        self.low_alpha = low_alpha
        self.same_class = same_class
        self.high_weight = high_weight
        self.low_weight = low_weight
        self.labeled_partners = labeled_partners
        self.groups = groups

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Add a mixture of each unlabelled row; its soft label and its weights as notes."""
        assert weak is not None
        own = weak.probabilities
        confidence, classes = own.max(dim=-1)
        high = confidence >= self.confident  # [unlabeled]
        pool, pool_classes = inputs.strong[0], classes
        if self.labeled_partners:
            pool = torch.cat([pool, inputs.labeled])
            pool_classes = torch.cat([classes, inputs.labels])
        partner, coin, centres, shares = self._draws(inputs.places, high)
        same_class = ~high & (coin < self.same_class)
        candidates = self._candidates(inputs.places, high, classes, pool_classes, same_class)
        partners, found = _drawn(candidates, partner)
        mixed, shares = _mixed(inputs.strong[0], pool[partners], shares, centres)
        hard = F.one_hot(classes, self.num_classes).float()
        label = torch.where(high[:, None], hard, own)
        other = F.one_hot(pool_classes[partners], self.num_classes).float()
        notes = {
            "mixed labels": shares[:, None] * label + (1 - shares[:, None]) * other,
            "high": (high & found).float(),
            "low": (~high & found) * confidence**3,
            "confident": high.float(),
        }
        further = (*inputs.further, mixed)
        return replace(inputs, further=further, notes={**inputs.notes, **notes})

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """FreeMatch's terms and both of the mixed rows, and the share of confident rows."""
        terms = super().loss(outputs, student_sums)
        logits, notes = outputs.further[0], outputs.notes
        labels, rows = notes["mixed labels"], outputs.unlabeled_rows
        high = notes["high"] * soft_cross_entropy(logits, labels)
        low = notes["low"] * squared_error(logits, labels)
        return replace(
            terms,
            extras={
                "srm_loss": self.high_weight * high.sum() / rows,
                "cam_loss": self.low_weight * low.sum() / rows,
            },
            metrics={**terms.metrics, "confident_rate": notes["confident"].sum() / rows},
        )

    def _draws(self, places: Places, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For the partner, for its class, for the place of a box [rows, 2]; and the shares."""
        noise = places.noise("regmixmatch", 4 + 2 * BETA_NUMBERS)
        plain, first, second = noise.split([4, BETA_NUMBERS, BETA_NUMBERS], dim=1)
        alphas = (self.high_alpha, self.low_alpha)
        shares = [beta(part, a, a) for part, a in zip((first, second), alphas, strict=True)]
        drawn = torch.cat([plain, torch.stack(shares, dim=1)], dim=1)
        drawn = drawn.to(high.device, non_blocking=True)
        shares_here = torch.where(high, drawn[:, 4], drawn[:, 5])
        return drawn[:, 0], drawn[:, 1], drawn[:, 2:4], shares_here

    def _candidates(
        self,
        places: Places,
        high: Tensor,
        classes: Tensor,
        pool_classes: Tensor,
        same_class: Tensor,
    ) -> Tensor:
        """Which rows each may be mixed with: bool [unlabeled, unlabeled and maybe labeled]."""
        groups = pool = group_of(places.unlabeled, places.unlabeled_rows, self.groups)
        confident = high
        if self.labeled_partners:
            labeled = group_of(places.labeled, places.labeled_rows, self.groups)
            pool = torch.cat([groups, labeled])
            confident = torch.cat([high, high.new_ones(len(labeled))])
        together = (groups[:, None] == pool).to(high.device, non_blocking=True)
        possible = together & confident
        possible.fill_diagonal_(False)
        alike = possible & (classes[:, None] == pool_classes)
        prefers = same_class & alike.any(dim=1)
        return torch.where(prefers[:, None], alike, possible)


def _drawn(candidates: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate of each row, int64 [rows], and whether it had any; without, the row itself."""
    before = candidates.cumsum(dim=1)  # [rows, pool]
    counts = candidates.sum(dim=1)
    number = (noise * counts).long()  # below the count: a product of fp32 could round up to it
    number = torch.minimum(number, (counts - 1).clamp(min=0))
    found = (before <= number[:, None]).sum(dim=1)
    own = torch.arange(len(candidates), device=candidates.device)
    return torch.where(counts > 0, found, own), counts > 0


def _mixed(
    rows: Tensor, partners: Tensor, shares: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows mixed with their partners, and their own shares."""
    if rows.dim() == 4:
        low, high = _SIDES
        return resize_mix(rows, partners, low + (high - low) * shares.sqrt(), centres)
    own = shares.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    return rows * own + partners * (1 - own), shares
