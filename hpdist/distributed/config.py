"""The config of the watchdog, and of batch normalisation."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from hpdist.config.section import Section

NormStatistics: TypeAlias = Literal["global", "rank"]
"""Whose rows batch normalisation takes its statistics from: those of all ranks, or a rank's own."""


class Watchdog(Section):
    """The watchdog, which ends a run that hangs."""

    seconds: float | None = Field(900.0, gt=0)
    """Seconds without progress after which every rank prints its stacks and exits; null never.

    Choose more than any evaluation batch, the compilation of the model, and
    `data.loading.patience` take.
    """
