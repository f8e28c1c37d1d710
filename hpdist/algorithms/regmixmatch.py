"""RegMixMatch: FreeMatch with each unlabelled row mixed with one the model is certain of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import Groups
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.freematch import FreeMatch
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.mixing import BETA_NUMBERS, GroupsOption, beta, count_groups, group_of
from hpdist.algorithms.parts.resizemix import resize_mix
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.view_request import Views
from hpdist.data.structures import sent
from hpdist.tasks.losses import soft_cross_entropy, squared_error

Weighting = Literal["mean", "row"]

_MANY_LABELS = 100  # per class: from this on labelled rows are mixed like confident ones
_SIDES = (0.1, 0.8)  # of a pasted box, as shares of the image's


class RegMixMatch(FreeMatch, name="regmixmatch"):
    """FreeMatch's loss, plus w_h L_SRM + w_l L_CAM of one mixture per row.

    With p_b of the weak view of u_b and y_b = argmax p_b, a row is confident if max p_b >= tau_m.
    The strong view of every row is mixed with a partner v, own share l:

    L_SRM = mean_b [u_b confident] H(l onehot(y_b) + (1 - l) onehot(y_v), p(mix_b)),
    L_CAM = mean_r (max p_r)^3 mean_r mean_c (l p_r + (1 - l) onehot(y_v) - p(mix_r))_c^2,

    r being the rows that are not confident. v is drawn for each row from its group of the global
    batch: from the confident rows, and where r is mixed also from the labelled ones, in their weak
    view; with probability `same_class` it must be of class y_r, and if there is none, the row
    stays unmixed. With many labels (`labeled_mixed`) labelled rows are also partners of confident
    ones, and each is itself mixed: their cross-entropies count in L_SRM's sum, but not in its
    number of rows. All means are over the global batch.

    Images [rows, C, H, W] are mixed by ResizeMix: v, cut to the middle 0.9, shrunk to the share 0.1
    + 0.7 sqrt(b) of its sides and pasted at a random place, with b ~ Beta(alpha, alpha) and l the
    area left; anything else by Mixup, u l + v (1 - l) with l ~ Beta(alpha, alpha).

    This follows the authors' released code except for the draws: there one coin for `same_class`,
    one share and one place serve a whole batch, here each row has its own. If the number of labels
    is not known (`class_counts` is not set), it counts as small.
    """

    paper: ClassVar[str] = "Han et al. 2025, arXiv:2412.10741"
    views: ClassVar[Views] = Views(weak=1, strong=1, inputs_need_targets=True)
    defaults: ClassVar[str] = (
        "The values of the authors' released configs for CIFAR-10.\n"
        "\n"
        "Those for CIFAR-100 have `confident: 0.99` and no CAM (`low_weight: 0`), those for "
        "STL-10\n`confident: 0.99`."
    )

    momentum: float = option(default=0.999, ge=0, lt=1)
    """Momentum of FreeMatch's moving averages."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of FreeMatch's unsupervised term."""
    fairness_weight: float = option(default=0.01, ge=0)
    """Weight of FreeMatch's fairness term; 0 saves one small collective a step."""
    max_threshold: float = option(default=1.0, gt=0, le=1)
    """Upper bound of FreeMatch's global threshold."""
    confident: float = option(default=0.999, ge=0, le=1)
    """Confidence from which a row is mixed with equally certain ones (tau_m)."""
    high_alpha: float = option(default=1.0, gt=0)
    """Parameter of the Beta distribution for the mixture of a confident row."""
    low_alpha: float = option(default=16.0, gt=0)
    """Parameter of the Beta distribution for the mixture of any other row."""
    same_class: float = option(default=0.5, ge=0, le=1)
    """Chance that the partner of a row that is not confident must be of its most likely class."""
    high_weight: float = option(default=1.0, ge=0)
    """Weight of the term of mixed confident rows (SRM)."""
    low_weight: float = option(default=1.0, ge=0)
    """Weight of the term of the other mixed rows (CAM)."""
    weighting: Weighting = option(default="mean")
    """Which confidence, cubed, weights a row of that term: the mean over its rows, as in the
    released code, or the row's own."""
    labeled_partners: bool = option(default=True)
    """Whether labelled rows are partners in that term (CAM), as in the released code."""
    labeled_mixed: bool | None = option(default=None)
    """Whether labelled rows are mixed, with confident ones and with one another, in the term of the
    confident rows (SRM). By default if there are 100 or more labelled rows per class, as in the
    released code, unless labelled rows are no partners in CAM either."""
    groups: Groups = option(default="auto", annotation=GroupsOption)
    """Parts of the global batch within which rows are mixed. Ranks times micro-batches must divide
    this number, and it must divide the batch. auto: at most 8, each with 8 or more rows of both
    kinds, as far as ranks and micro-batches allow."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        self._low = (torch.ones((), device=device),) * 2  # [] each, of this step; see `observe`

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """FreeMatch's sums; the number of unconfident rows, and their confidence cubed."""
        confidence = weak.probabilities.amax(dim=-1)
        low = (confidence < self.confident).float()
        own = {"low_rows": low.sum(), "low_cubes": (low * confidence**3).sum()}
        return super().statistics(weak) | own

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Move FreeMatch's averages; store the number of CAM rows and their mean weight."""
        super().observe(sums, unlabeled_rows)
        rows = sums["low_rows"].clamp(min=1)
        self._low = rows, sums["low_cubes"] / rows

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Add a mixture of each unlabelled row, and of each labelled one if there are many."""
        assert weak is not None
        own = weak.probabilities
        confidence, classes = own.max(dim=-1)
        high = confidence >= self.confident  # [unlabeled]
        rows, labeled, pool = self._pool(inputs, classes, high)
        mixes_labeled = self._mixes_labeled()
        draws = self._draws(inputs.positions, high)
        same_class = (draws.coin < self.same_class)[:, None]
        same_labels = classes[:, None] == pool.classes
        partners = torch.where(
            high[:, None],
            pool.open_to(rows, labeled=mixes_labeled),
            pool.open_to(rows, labeled=self.labeled_partners) & (same_labels | ~same_class),
        )
        label = torch.where(high[:, None], self._one_hot(classes), own)
        mixed, labels = self._mixed(rows, label, pool, partners, draws)
        extra_inputs = [*inputs.extra_inputs, mixed]
        context = {
            "mixed labels": labels,
            "high": high.float(),
            "low": (~high).float() * (confidence**3 if self.weighting == "row" else 1.0),
        }
        if mixes_labeled:
            everyone = torch.ones_like(labeled.classes, dtype=torch.bool)
            label = self._one_hot(labeled.classes)
            draws = self._draws(inputs.positions, everyone, labeled=True)
            partners = pool.open_to(labeled, labeled=True)
            mixed, labels = self._mixed(labeled, label, pool, partners, draws)
            extra_inputs.append(mixed)
            context["mixed labels of labelled rows"] = labels
        return replace(
            inputs, extra_inputs=tuple(extra_inputs), context={**inputs.context, **context}
        )

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """FreeMatch's terms, both terms of the mixed rows, and the share of confident rows."""
        terms = super().loss(outputs, student_sums)
        logits, context, rows = outputs.extra_inputs[0], outputs.context, outputs.unlabeled_rows
        labels = context["mixed labels"]
        high = (context["high"] * soft_cross_entropy(logits, labels)).sum()
        if "mixed labels of labelled rows" in context:
            targets = context["mixed labels of labelled rows"]
            high = high + soft_cross_entropy(outputs.extra_inputs[1], targets).sum()
        low_rows, weight = self._low
        low = (context["low"] * squared_error(logits, labels)).sum() / low_rows
        if self.weighting == "mean":
            low = weight * low
        mixed = replace(
            terms,
            extras={"srm_loss": self.high_weight * high / rows, "cam_loss": self.low_weight * low},
            metrics={**terms.metrics, "confident_rate": context["high"].sum() / rows},
        )
        return self.burned_in(mixed)

    def _mixes_labeled(self) -> bool:
        """Whether labelled rows are mixed too; constant over a run."""
        if self.labeled_mixed is None:
            counts = self.class_counts if self.labeled_partners else None
            labels = 0.0 if counts is None else float(counts.sum())
            self.labeled_mixed = labels >= _MANY_LABELS * self.num_classes
        return self.labeled_mixed

    def _pool(
        self, inputs: StudentInputs, classes: Tensor, high: Tensor
    ) -> tuple[_Rows, _Rows, _Pool]:
        """The unlabelled rows, the labelled ones, and all possible partners."""
        positions, device = inputs.positions, high.device
        groups = count_groups(self.groups, positions)
        of_unlabeled, of_labeled = (
            sent(group_of(positions, count, groups), device)
            for positions, count in (
                (positions.unlabeled, positions.unlabeled_rows),
                (positions.labeled, positions.labeled_rows),
            )
        )
        rows = _Rows(inputs.strong[0], classes, of_unlabeled)
        labeled = _Rows(inputs.labeled, inputs.labels, of_labeled)
        pool = _Pool(
            torch.cat([rows.inputs, labeled.inputs]),
            torch.cat([classes, inputs.labels]),
            torch.cat([of_unlabeled, of_labeled]),
            torch.cat([high, torch.zeros_like(inputs.labels, dtype=torch.bool)]),
            torch.cat([torch.zeros_like(high), torch.ones_like(inputs.labels, dtype=torch.bool)]),
        )
        return rows, labeled, pool

    def _draws(self, positions: BatchPositions, high: Tensor, *, labeled: bool = False) -> _Draws:
        """The draws for each row, on the device of `high`, which chooses alpha."""
        noise = positions.noise("regmixmatch", 4 + 2 * BETA_NUMBERS, labeled=labeled)
        plain, first, second = noise.split([4, BETA_NUMBERS, BETA_NUMBERS], dim=1)
        alphas = (self.high_alpha, self.low_alpha)
        shares = [beta(part, a, a) for part, a in zip((first, second), alphas, strict=True)]
        drawn = torch.cat([plain, torch.stack(shares, dim=1)], dim=1)
        drawn = sent(drawn, high.device)
        shares_here = torch.where(high, drawn[:, 4], drawn[:, 5])
        return _Draws(drawn[:, 0], drawn[:, 1], drawn[:, 2:4], shares_here)

    def _mixed(
        self, rows: _Rows, labels: Tensor, pool: _Pool, partners: Tensor, draws: _Draws
    ) -> tuple[Tensor, Tensor]:
        """Rows mixed with one of their `partners` each, bool [rows, pool], and their soft labels.

        A row without partners stays as it is.
        """
        chosen, found = _drawn(partners, draws.partner)
        mixed, shares = _mix(rows.inputs, pool.inputs[chosen], draws)
        mixed = torch.where(found.view(-1, *[1] * (mixed.dim() - 1)), mixed, rows.inputs)
        shares = torch.where(found, shares, 1.0)[:, None]
        return mixed, shares * labels + (1 - shares) * self._one_hot(pool.classes[chosen])

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.num_classes).float()


RegMixMatchConfig = RegMixMatch.Config


@dataclass(frozen=True)
class _Rows:
    """Rows that are to be mixed."""

    inputs: Tensor  # [rows, *]
    classes: Tensor  # [rows], int64
    groups: Tensor  # [rows], int64


@dataclass(frozen=True)
class _Pool(_Rows):
    """The rows that others may be mixed with."""

    confident: Tensor  # [rows], bool: unlabelled and confident
    labeled: Tensor  # [rows], bool

    def open_to(self, rows: _Rows, *, labeled: bool) -> Tensor:
        """The rows of its group in the pool that each row may be mixed with: bool [rows, pool]."""
        allowed = self.confident | self.labeled if labeled else self.confident
        return (rows.groups[:, None] == self.groups) & allowed


@dataclass(frozen=True)
class _Draws:
    """The draws for each row."""

    partner: Tensor  # [rows], uniform
    coin: Tensor  # [rows], uniform
    centres: Tensor  # [rows, 2], uniform: of a pasted box
    shares: Tensor  # [rows], Beta


def _drawn(candidates: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate of each row, int64 [rows], and whether it has any; if not, the first."""
    before = candidates.cumsum(dim=1)  # [rows, pool]
    counts = candidates.sum(dim=1)
    number = (noise * counts).long()  # below the count: a product of fp32 could round up to it
    number = torch.minimum(number, (counts - 1).clamp(min=0))
    found = (before <= number[:, None]).sum(dim=1)
    return torch.where(counts > 0, found, 0), counts > 0


def _mix(rows: Tensor, partners: Tensor, draws: _Draws) -> tuple[Tensor, Tensor]:
    """Rows mixed with their partners, and their own shares."""
    if rows.dim() == 4:
        low, high = _SIDES
        sides = low + (high - low) * draws.shares.sqrt()
        return resize_mix(rows, partners, sides, draws.centres)
    own = draws.shares.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    return rows * own + partners * (1 - own), draws.shares
