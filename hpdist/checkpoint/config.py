"""The config of saving and resuming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hpdist.config.section import Section


class Checkpoint(Section):
    """Saving and resuming."""

    every: int | None = Field(None, gt=0)
    """Optimizer steps between checkpoints; by default time decides. The last step has one too."""
    minutes: float | None = Field(15.0, gt=0)
    """Minutes between checkpoints, by the first rank's clock; null if only `every` counts.

    With both, whichever comes first; without either, only the last step has a checkpoint.
    """
    keep: int = Field(2, ge=2)
    """How many checkpoints are kept."""
    background: bool = True
    """Continue training while a checkpoint is written; needs a copy of the state in host memory."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest intact checkpoint; never refuses a non-empty folder."""

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("every") is not None:
            return {"minutes": None, **values}
        return values
