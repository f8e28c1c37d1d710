"""What a config says of a run that hangs."""

from __future__ import annotations

from pydantic import Field

from hpdist.config.section import Section


class Watchdog(Section):
    """The end of a run that hangs."""

    seconds: float | None = Field(900.0, gt=0)
    """Without progress for so long, every rank prints its stacks and exits; null waits for ever.

    Longer than any evaluation batch, the compilation of the model, and `data.loading.patience`.
    """
