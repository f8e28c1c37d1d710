"""The types of what a run adds to a checkpoint's manifest: its counters and its positions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hpdist.checkpoint.manifest import Count

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StreamFacts(BaseModel):
    """Where a stream of batches goes on; its reader checks what `order` and `resume` hold."""

    model_config = ConfigDict(strict=True, extra="allow")

    position: Count
    rows: Count | None
    order: dict[str, Any]
    resume: Any


class DataFacts(BaseModel):
    """Counts of the rows that could not be used: of the run, and of an epoch (epoch, rows)."""

    model_config = ConfigDict(strict=True, extra="allow")

    bad_rows: Count
    bad_in_epoch: tuple[int, Count] = Field(strict=False)


class RunFacts(BaseModel):
    """What `RunState.save` hands to the writer of checkpoints, for `open_newest` to check."""

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
