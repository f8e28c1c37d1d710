"""What happens when a training has diverged: it ends, or goes on from before."""

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
    """Looks at the records of a run, and takes one that has diverged back to a checkpoint.

    Args:
        config: What counts as a divergence, and how often to go back.
        folder: Of the run.
        state: What is taken back.
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
        """The first step of what has gone wrong, and what it is; None while all is well."""
        return self._monitor.look(self._state.step.applied_steps, record)

    def go_back(self, first: int, what: str, log: RunLog) -> dict[str, Any]:
        """Take the run to before a divergence that began at step `first`, or end it. Collective.

        Gives what the checkpoint says of the run; raises DivergenceError where there is none, or
        it has been too often.
        """
        config, step, checkpoints = self._config, self._state.step, self._folder.checkpoints
        log.log_line(f"step {step.applied_steps}: {what}")
        log.alert("divergence", what)
        advice = "try a lower optim.lr, a higher threshold, or optim.grad_clip"
        if config.on == "stop" or not self._saving.keeps:
            raise DivergenceError(
                f"{what}; {advice}; divergence.on: rollback goes on from a checkpoint before"
            )
        self._saving.finish()
        saved = checkpoint.open_newest(checkpoints, log.log_line, before=first, facts=RunFacts)
        if saved is None or self._count == config.most_rollbacks:
            why = f"after {self._count} rollbacks" if saved else "no checkpoint is from before"
            raise DivergenceError(f"{what}; {why}; {advice}")
        self._count += 1
        facts = self._state.load(saved, data=False)
        self._monitor.forget()
        run_on_main(lambda: checkpoint.drop_after(checkpoints, facts["step"]))
        call_on_all_ranks(lambda: self._folder.drop_metrics_after(step.applied_steps))
        log.log_line(f"back to step {step.applied_steps}, and on with the rows that follow")
        return facts
