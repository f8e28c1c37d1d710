"""Distributions near given ones whose classes have given sums, of rows that several ranks hold.

The problem and its solution are DARP's (Kim et al. 2020, arXiv:2007.08844, section 3). All that
ranks exchange are sums and largest values over their rows, C numbers at a time, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpdist.algorithms.over_ranks import ONE_RANK, OverRanks
from hpdist.algorithms.parts.selection import Entries, Selection, select_largest

_NEWTON_STEPS = 10  # from the previous solution; each doubles the number of exact digits
_SMALL = 1e-6  # for a class that was removed from a row
_HELD = 1 << 25  # numbers of a rank in fp64 that are held and not calculated again

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives ids, int64 [rows], and probabilities, fp32 or fp64 [rows, classes], of this rank's rows,
some at a time; it is called again for every pass over them."""


@dataclass(frozen=True)
class Near:
    """The solution: what is needed to give the rows of the result one after another."""

    selection: Selection
    scale: Tensor
    """What each class's probabilities that were kept are multiplied by, fp64 [classes]."""
    nu: Tensor
    """The classes' multipliers, fp64 [classes]."""

    def logs(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Give the log of rows in which a class is small where others have more of it, fp64."""
        kept = self.selection.of(Entries(probabilities, ids))
        chosen = probabilities.double() * kept * self.scale + _SMALL
        return (chosen / chosen.sum(dim=1, keepdim=True)).log()

    def rows(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Give rows of the result, fp64 [rows, classes], which sum to 1."""
        logs = self.logs(ids, probabilities)
        entropy = -(logs.exp() * logs).sum(dim=1, keepdim=True)
        return (logs - self.nu * entropy).softmax(dim=1)


def find_near(
    blocks: Blocks,
    amounts: Tensor,
    alpha: float,
    iterations: int,
    rows: int,
    dtype: torch.dtype,
    ranks: OverRanks = ONE_RANK,
) -> Near:
    """Solve for rows near `blocks` that sum to 1, with about the given sum of every class.

    Args:
        blocks: This rank's rows.
        amounts: Of each class, fp64 [classes], positive, summing to the number of all rows.
        alpha: Keeps a class only in this many times its amount of rows, those with most of it.
        iterations: Rounds of coordinate ascent.
        rows: What is more than any id.
        dtype: Of the probabilities.
        ranks: Those that hold rows. Collective, where there are several.
    """
    wanted = (alpha * amounts).floor().clamp(min=1).long()

    def count(which: Callable[[Entries], Tensor]) -> Tensor:
        found = torch.zeros_like(wanted)
        for ids, own in blocks():
            entries = Entries(own, ids)
            found = found + entries.count(which(entries), len(wanted))
        return ranks.sum(found)

    selection = select_largest(count, wanted, rows, dtype)
    sums = torch.zeros_like(amounts)
    for ids, own in blocks():
        sums = sums + (own.double() * selection.of(Entries(own, ids))).sum(dim=0)
    scale = amounts / ranks.sum(sums).clamp(min=_SMALL)
    near = Near(selection, scale, torch.zeros_like(amounts))
    return replace(near, nu=_ascend(_logs(near, blocks), amounts.log(), iterations, ranks))


def _logs(near: Near, blocks: Blocks) -> Callable[[], Iterable[Tensor]]:
    """Give what calculates the logs of every block, or holds them where they are few."""

    def calculated() -> Iterable[Tensor]:
        return (near.logs(ids, own) for ids, own in blocks())

    if sum(own.numel() for _, own in blocks()) > _HELD:
        return calculated
    held = list(calculated())
    return lambda: held


def _ascend(
    logs: Callable[[], Iterable[Tensor]], goal: Tensor, iterations: int, ranks: OverRanks
) -> Tensor:
    """Find the classes' multipliers, by rounds of rows' sums and then classes', fp64 [classes]."""
    nu = torch.zeros_like(goal)
    entropies = [-(own.exp() * own).sum(dim=1, keepdim=True) for own in logs()]  # [rows, 1], 1 / w
    for _ in range(iterations):
        norms = [
            torch.logsumexp(own - nu * entropy, dim=1, keepdim=True)
            for own, entropy in zip(logs(), entropies, strict=True)
        ]
        for _ in range(_NEWTON_STEPS):
            pulled = (
                (own - norm - nu * entropy, entropy)
                for own, norm, entropy in zip(logs(), norms, entropies, strict=True)
            )
            log_sum, slope = _sums(pulled, goal, ranks)
            nu = nu - (log_sum - goal) / slope
    return nu


def _sums(
    blocks: Iterable[tuple[Tensor, Tensor]], like: Tensor, ranks: OverRanks
) -> tuple[Tensor, Tensor]:
    """Give log sum exp of all rows' scores, and how it changes with nu; fp64 [classes] both.

    `blocks` are scores [rows, classes] and entropies [rows, 1] of this rank's rows.
    """
    largest = torch.full_like(like, -torch.inf)
    sums = torch.zeros(2, *like.shape, dtype=like.dtype, device=like.device)
    for scores, entropy in blocks:
        found = torch.maximum(largest, scores.amax(dim=0))
        shares = (scores - found).exp()
        own = torch.stack([shares.sum(dim=0), (shares * entropy).sum(dim=0)])
        sums, largest = sums * (largest - found).exp() + own, found
    everywhere = ranks.max(largest)
    total, weighted = ranks.sum(sums * (largest - everywhere).exp())
    return everywhere + total.log(), -weighted / total
