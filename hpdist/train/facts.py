"""The types of a run's facts in a checkpoint's manifest: its counters and its positions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hpdist.checkpoint.manifest import Count

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StreamFacts(BaseModel):
    """The position of a stream of batches; its reader checks `order` and `resume`."""

    model_config = ConfigDict(strict=True, extra="allow")

    position: Count
    rows: Count | None
    order: dict[str, Any]
    resume: Any


class DataFacts(BaseModel):
    """Numbers of unusable rows: in the run, and in an epoch (epoch, rows)."""

    model_config = ConfigDict(strict=True, extra="allow")

    bad_rows: Count
    bad_in_epoch: tuple[int, Count] = Field(strict=False)


class RunFacts(BaseModel):
    """The facts that `RunState.save` gives the writer of checkpoints; `open_newest` checks them."""

    model_config = ConfigDict(strict=True, extra="allow")

    attempts: Count
    overflows: Count
    best: Annotated[tuple[float, Count], Field(strict=False)] | None
    teacher_updates: Count
    loss_scale: dict[str, bool | int | float]
    optimizer: dict[str, float]
    streams: dict[str, StreamFacts]
    data: DataFacts
    identity: dict[str, Any]
    seconds: _Seconds
    tracker_run_id: str | None
    optimizer_apart: dict[str, dict[str, float]] = {}
    pending: dict[str, Any] | None = None
