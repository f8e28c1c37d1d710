"""What a config says of the evaluation during training."""

from __future__ import annotations

from pydantic import Field

from hpdist.config.section import Section


class Eval(Section):
    """Evaluation during training."""

    every: int | None = Field(None, gt=0)
    """Optimizer steps between evaluations; only at the end by default."""
    batch: int = Field(256, gt=0)
    """Rows per device per forward."""
