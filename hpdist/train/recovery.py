"""The reaction to a diverged training: the run ends, or resumes from an earlier checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpdist.checkpoint import reader as checkpoint
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.errors import DivergenceError
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.divergence import Divergence, DivergenceMonitor
from hpdist.train.facts import RunFacts
from hpdist.train.run_log import RunLog
from hpdist.train.saving import Saving
from hpdist.train.state import RunState


class Rollback:
    """Checks the records of a run, and rolls a diverged one back to a checkpoint.

    Args:
        config: What counts as a divergence, and the number of rollbacks.
        folder: Of the run.
        state: The state to restore.
        saving: Of the run.
    """

    def __init__(
        self, config: Divergence, folder: RunFolder, state: RunState, saving: Saving
    ) -> None:
        self._config = config
        self._folder = folder
        self._state = state
        self._saving = saving
        self._monitor = DivergenceMonitor(config)
        self._count = 0

    def look(self, record: Mapping[str, Any]) -> tuple[int, str] | None:
        """The first step of a divergence, and its description; None if there is none."""
        return self._monitor.look(self._state.step.applied_steps, record)

    def go_back(self, first: int, what: str, log: RunLog) -> dict[str, Any]:
        """Roll the run back to before a divergence that began at `first`, or end it. Collective.

        Returns the facts of the checkpoint; raises DivergenceError if there is none, or after too
        many rollbacks.
        """
        config, step, checkpoints = self._config, self._state.step, self._folder.checkpoints
        log.log_line(f"step {step.applied_steps}: {what}")
        log.alert("divergence", what)
        advice = "try a lower optim.lr, a higher threshold, or optim.grad_clip"
        if config.on == "stop" or not self._saving.keeps:
            raise DivergenceError(
                f"{what}; {advice}; divergence.on: rollback resumes from a checkpoint before"
            )
        self._saving.finish()
        saved = checkpoint.open_newest(checkpoints, log.log_line, before=first, facts=RunFacts)
        if saved is None or self._count == config.most_rollbacks:
            why = f"after {self._count} rollbacks" if saved else "no earlier checkpoint"
            raise DivergenceError(f"{what}; {why}; {advice}")
        self._count += 1
        facts = self._state.load(saved, data=False)
        self._monitor.forget()
        run_on_main(lambda: checkpoint.drop_after(checkpoints, facts["step"]))
        call_on_all_ranks(lambda: self._folder.drop_metrics_after(step.applied_steps))
        log.log_line(f"back at step {step.applied_steps}, continuing with the rows that follow")
        return facts
