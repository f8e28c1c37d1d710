"""The records of a run: one per logged step, and the summary at its end."""

from __future__ import annotations

from typing import Any

from hpdist.distributed.collectives import all_reduce_max, world_size
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.models.activation_checkpointing import peak_memory
from hpdist.train.data import RunData
from hpdist.train.outcome import StepOutcome
from hpdist.train.run_log import RunLog
from hpdist.train.saving import Saving
from hpdist.train.state import RunState
from hpdist.train.step import SemiSupervisedStep


class Records:
    """Assembles the numbers of a run.

    Args:
        step: Of the run.
        data: Of the run.
        state: Of the run.
        saving: Of the run.
        sharding: Of the run.
        rows: Of a global batch.
    """

    def __init__(
        self,
        step: SemiSupervisedStep,
        data: RunData,
        state: RunState,
        saving: Saving,
        sharding: ExecutionPlan,
        rows: int,
    ) -> None:
        self._step = step
        self._data = data
        self._state = state
        self._saving = saving
        self._sharding = sharding
        self._rows = rows

    def waits(self, log: RunLog) -> dict[str, float]:
        """Seconds since the last record that this rank has waited, by reason."""
        return log.since_record({"data_wait": self._data.waited, **self._saving.waited})

    def of_step(self, outcome: StepOutcome, lr: float, log: RunLog) -> dict[str, Any]:
        """Return the record of a measured step."""
        teacher = self._step.teacher
        return {
            **outcome.metrics,
            **outcome.per_class,
            "loss_scale": outcome.new_scale,
            "overflows": self._state.overflows,
            "lr": lr,
            **({} if teacher is None else {"teacher_decay": teacher.decay_now}),
            "grad_norm": outcome.grad_norm if outcome.grad_norm is not None else 0.0,
            "epoch": self._data.epoch,
            "bad_rows": self._data.bad_rows,
            **log.speed(self._rows, outcome.per_rank),
        }

    def of_run(self, seconds: float) -> dict[str, object]:
        """Return the summary's entries beside scores. Collective."""
        step, sharding = self._step, self._sharding
        return {
            "steps": step.applied_steps,
            "skipped_steps": step.attempts - step.applied_steps,
            "seconds": round(seconds, 3),
            "examples": step.attempts * self._rows,
            "world_size": world_size(),
            "precision": sharding.precision,
            "zero_stage": sharding.stage,
            **({} if sharding.shard.engine is None else {"shard_engine": sharding.shard.engine}),
            "bad_rows": self._data.bad_rows,
            **self._data.duplicates.summary,
            "peak_memory_bytes": all_reduce_max(peak_memory(step.engine.device)),
        }
