"""Mixing of rows: partners, shares, and the mixing itself.

A row's partner is drawn within its group of the global batch, its share of the mixture by its
position in that batch. If every group lies within a micro-batch, mixed rows are therefore the
same on any number of ranks and micro-batches, and no row needs another rank's.

The number of groups is an option, or follows from the sizes of the global batch alone
(`choose_groups`), unless ranks and micro-batches divide it further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.base import Groups
from hpdist.algorithms.positions import BatchPositions
from hpdist.data.structures import sent
from hpdist.errors import ConfigError

GroupsOption = Annotated[int, Field(ge=1)] | Literal["auto"]
"""The allowed values of `groups` in a config."""
ENOUGH_ROWS = 8
"""Rows of each kind that a group has, unless something forces it to be smaller."""
_MOST_GROUPS = 8

_TRIES = 6  # even; each is refused with a chance below 0.05, all of them below 2e-8
_GAMMA_NUMBERS = 2 * _TRIES + 1
BETA_NUMBERS = 2 * _GAMMA_NUMBERS
"""Uniform numbers per Beta draw."""


@dataclass(frozen=True)
class Mixing:
    """Which rows are mixed with which: row i becomes s_i row_i + (1 - s_i) row_partner(i)."""

    partners: Tensor  # [rows], int64
    shares: Tensor  # [rows], fp32, in [0, 1]

    def __call__(self, rows: Tensor) -> Tensor:
        """Mix inputs or soft labels, floating-point [rows, *]."""
        own = self.shares.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
        return rows * own + rows[self.partners] * (1 - own)

    def own_most(self) -> Mixing:
        """Return the mixing with shares of at least a half: s = max(s, 1 - s)."""
        return Mixing(self.partners, torch.maximum(self.shares, 1 - self.shares))


def draw_mixing(
    positions: BatchPositions,
    name: str,
    alpha: float,
    groups: Groups,
    *,
    labeled: int = 0,
    unlabeled: int = 0,
    device: torch.device | str = "cpu",
) -> Mixing:
    """Draw how a micro-batch's concatenated rows are mixed; shares are Beta(alpha, alpha).

    Args:
        positions: Of the micro-batch.
        name: Separates these draws from others.
        alpha: Of the Beta distribution.
        groups: Parts of the global batch within which rows are mixed; see `count_groups`.
        labeled: How many views of the labelled rows come first.
        unlabeled: How many views of the unlabelled rows follow.
        device: The device of the result.

    Raises ConfigError where a micro-batch does not hold whole groups.

    """
    count = count_groups(groups, positions)
    views = [("labeled", copy) for copy in range(labeled)]
    views += [("unlabeled", copy) for copy in range(unlabeled)]
    noise = [
        positions.noise(f"{name} {kind} {copy}", 1 + BETA_NUMBERS, labeled=kind == "labeled")
        for kind, copy in views
    ]
    of_labeled = group_of(positions.labeled, positions.labeled_rows, count)
    of_unlabeled = group_of(positions.unlabeled, positions.unlabeled_rows, count)
    of_rows = torch.cat([of_labeled] * labeled + [of_unlabeled] * unlabeled)
    numbers = torch.cat(noise)  # [rows, 1 + BETA_NUMBERS]
    partners = draw_partners(of_rows, numbers[:, 0])
    shares = beta(numbers[:, 1:], alpha, alpha)
    return Mixing(
        sent(partners, device),
        sent(shares, device),
    )


def draw_partners(groups: Tensor, noise: Tensor) -> Tensor:
    """Return one row of its group for every row: a permutation of each group, int64 [rows].

    `groups` is int64 [rows], `noise` uniform in [0, 1) [rows]. The result depends only on a group's
    own rows, in their order.
    """
    positions = groups.argsort(stable=True)
    drawn = (groups + noise.double()).argsort(stable=True)  # noise has 24 bits, the sum is exact
    return torch.empty_like(positions).index_copy_(0, positions, drawn)


def beta(numbers: Tensor, a: float, b: float) -> Tensor:
    """Beta(a, b) draws, fp32 [rows], as a pure function of uniform ones.

    `numbers` is in [0, 1) [rows, BETA_NUMBERS]. With X ~ Gamma(a), Y ~ Gamma(b) it is X / (X + Y),
    computed in logarithms, as with a small a both may underflow.
    """
    first, second = numbers.double().split(_GAMMA_NUMBERS, dim=1)
    return (_log_gamma_draw(first, a) - _log_gamma_draw(second, b)).sigmoid().float()


def _log_gamma_draw(numbers: Tensor, shape: float) -> Tensor:
    """The logarithm of Gamma(shape) draws, fp64 [rows]; `numbers` [rows, _GAMMA_NUMBERS].

    Marsaglia and Tsang 2000, "A simple method for generating gamma variables": with a standard
    normal x and v = (1 + c x)^3, d v is taken if log u < x^2 / 2 + d - d v + d log v, for d = shape
    - 1/3 and c = 1 / sqrt(9 d). A shape below 1 is drawn as Gamma(shape + 1) u^(1 / shape).
    """
    first, second, refusal, boost = numbers.split([_TRIES // 2, _TRIES // 2, _TRIES, 1], dim=1)
    radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)  # [rows, _TRIES]
    d = (shape if shape >= 1 else shape + 1) - 1 / 3
    v = (1 + normal / math.sqrt(9 * d)) ** 3
    log_v = v.clamp(min=1e-300).log()
    taken = (v > 0) & (torch.log1p(-refusal) < normal.square() / 2 + d - d * v + d * log_v)
    number = taken.byte().argmax(dim=1, keepdim=True)  # the first that is taken
    log_v = log_v.gather(1, number).where(taken.any(dim=1, keepdim=True), 0.0)[:, 0]
    small = torch.log1p(-boost[:, 0]) / shape if shape < 1 else 0.0
    return math.log(d) + log_v + small


def group_of(positions: Tensor, rows: int, groups: int) -> Tensor:
    """The group of each position of a global batch, int64 [rows]."""
    return positions * groups // max(rows, 1)


def choose_groups(labeled_rows: int, unlabeled_rows: int, slices: int = 1) -> int:
    """Choose the number of groups for a global batch of these sizes, if no option gives it.

    A power of two, at most 8, that leaves at least `ENOUGH_ROWS` rows of each kind in a group: it
    depends on nothing but the global batch. Only if the slices (ranks times micro-batches) do not
    divide it, each slice is a group.
    """
    sizes, groups = (labeled_rows, unlabeled_rows), 1
    while groups < _MOST_GROUPS and all(
        size % (2 * groups) == 0 and size // (2 * groups) >= ENOUGH_ROWS for size in sizes
    ):
        groups *= 2
    return groups if groups % slices == 0 else slices


def count_groups(groups: Groups, positions: BatchPositions) -> int:
    """The number of groups of a micro-batch's global batch.

    Raises ConfigError where a micro-batch does not hold whole groups.
    """
    slices = positions.labeled_rows // len(positions.labeled) if len(positions.labeled) else 1
    if groups == "auto":
        return choose_groups(positions.labeled_rows, positions.unlabeled_rows, slices)
    if len(positions.labeled):
        check_groups(groups, slices)
    return groups


def check_groups(groups: Groups, slices: int) -> None:
    """Raise ConfigError unless each slice of a global batch holds whole groups."""
    if groups != "auto" and groups % slices:
        raise ConfigError(
            f"rows are mixed within {groups} groups of the global batch, which {slices} slices "
            "(ranks times micro-batches) cut apart; change algorithm.groups, or leave it out"
        )


def check_group_sizes(
    name: str, groups: Groups, sizes: Mapping[str, int], slices: int, mixed: tuple[str, ...]
) -> str | None:
    """What a user should know of the groups in which rows are mixed; None if all is well.

    Args:
        name: Of the algorithm.
        groups: Its option.
        sizes: Rows of the global batch, "labeled" and "unlabeled".
        slices: Ranks times micro-batches.
        mixed: The kinds of rows that are mixed.

    Raises ConfigError if a batch does not divide into groups, if slices cut one apart, or if a
    group has only one row of a kind, which then has no partner.

    """
    check_groups(groups, slices)
    usual = choose_groups(sizes["labeled"], sizes["unlabeled"])
    count = groups
    if count == "auto":
        count = choose_groups(sizes["labeled"], sizes["unlabeled"], slices)
    where = f"{name} mixes rows within {count} {'group' if count == 1 else 'groups'} of the batch"
    for kind, size in sizes.items():
        if size % count:
            raise ConfigError(
                f"{where}, and {size} {_spelled(kind)} rows do not divide into that many; change "
                f"batch.{kind} or algorithm.groups"
            )
    few = {kind: sizes[kind] // count for kind in mixed if sizes[kind] // count < ENOUGH_ROWS}
    few_rows = " and ".join(f"{rows} {_spelled(kind)}" for kind, rows in few.items())
    wanted = " and ".join(f"batch.{kind} to {ENOUGH_ROWS * count} or more" for kind in few)
    if count == slices > 1:
        remedy = f"raise {wanted}, or use fewer ranks and micro-batches (here {slices} in all)"
    elif count > usual:
        remedy = f"raise {wanted}, or set algorithm.groups to {max(usual, slices)}"
    else:
        remedy = f"raise {wanted}"
    if 1 in few.values():
        raise ConfigError(
            f"{where}, each with only {few_rows}, which leaves none to mix with; {remedy}"
        )
    context = [f"each with only {few_rows}: hardly any to mix with; {remedy}"] if few else []
    if groups == "auto" and count != usual:
        context.append(
            f"one for each of {slices} ranks and micro-batches, not {usual}: mixtures differ "
            f"from those of other numbers of them; algorithm.groups: {count} keeps them the same"
        )
    return f"{where}, {'. They are '.join(context)}" if context else None


def _spelled(kind: str) -> str:
    return kind.replace("labeled", "labelled")
