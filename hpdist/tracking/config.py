"""The config of logging and of the tracker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpdist.config.section import Section


class Log(Section):
    """Logging of the training step."""

    every: int = Field(10, gt=0)
    """Optimizer steps between records."""
    examples: int = Field(8, ge=0)
    """Rows of the first batch whose weak and strong views are written into the run folder's
    `examples`, where the report also finds rows of the test set; 0: none of either."""


class Tracker(Section):
    """Where metrics go besides metrics.jsonl."""

    name: Literal["wandb", "tensorboard", "mlflow", "none"] = "wandb"
    """The tracker's name."""
    project: str | None = None
    """The tracker's project; by default WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else hpdist."""
    mode: Literal["offline", "online"] | None = None
    """offline writes to the run folder; `wandb sync` uploads later.

    By default WANDB_MODE, else offline.
    """
