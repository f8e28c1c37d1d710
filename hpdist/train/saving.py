"""When a run is saved, and the writing of its checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpdist.checkpoint.config import Checkpoint
from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.messages.progress import working
from hpdist.train.state import RunState

_LAST_SECONDS = 20.0  # that a failed run waits for its latest checkpoint


class Saving:
    """The checkpoints of a run, begun when they are due and written one at a time.

    Args:
        config: The intervals.
        steps: Of the whole run, the last of which is always saved.
        state: What is saved.
        folder: Of the checkpoints; None for a run without any.

    Collective: every rank must construct it.
    """

    def __init__(
        self,
        config: Checkpoint,
        steps: int,
        state: RunState,
        folder: Path | None,
    ) -> None:
        self._config = config
        self._steps = steps
        self._state = state
        engine = state.step.engine
        self._main = engine.rank == 0  # its clock decides
        self.writer: CheckpointWriter | None = None
        if folder is not None:
            self.writer = CheckpointWriter(
                folder,
                engine.rank,
                engine.world_size,
                keep=config.keep,
                background=config.background,
            )
        self._saved_at = time.monotonic()
        self._saved_attempt = -1

    @property
    def keeps(self) -> bool:
        """Whether the run has checkpoints."""
        return self.writer is not None

    @property
    def waited(self) -> dict[str, float]:
        """Seconds that the training has waited for checkpoints, by the name in a record."""
        return {} if self.writer is None else {"checkpoint_wait": self.writer.waited}

    @property
    def saved(self) -> bool:
        """Whether the run's present state is saved."""
        return self.writer is None or self._saved_attempt == self._state.step.attempts

    def take_for_saved(self) -> None:
        """Note that the run's present state is that of a checkpoint."""
        self._saved_attempt = self._state.step.attempts

    def asks(self) -> bool:
        """Whether it is time for a checkpoint: on the first rank, which informs all."""
        minutes = self._config.minutes
        if not self._main or self.writer is None or minutes is None:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    def due(self, asked: bool) -> bool:
        """Whether the step that was done is to be saved; `asked` is whether any rank `asks`."""
        every, done = self._config.every, self._state.step.applied_steps
        return done == self._steps or asked or (every is not None and done % every == 0)

    def save(self, facts: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint. Every rank must call."""
        if self.writer is None:
            return
        self.take_for_saved()
        self._saved_at = time.monotonic()
        self._state.save(self.writer, facts)
        self._log_problems(self.writer)

    def _log_problems(self, writer: CheckpointWriter) -> None:
        for problem in writer.problems():
            warnings.warn(
                f"{problem}; the training continues, earlier checkpoints are intact, and the next "
                "one is tried when it is due",
                stacklevel=2,
            )

    @working("writing the checkpoint")
    def finish(self) -> None:
        """Wait until the latest checkpoint is safe. Collective; raises CheckpointError if not."""
        if self.writer is not None:
            self.writer.finish()
            self._log_problems(self.writer)

    def close(self) -> None:
        """Give a pending write, also of a failed run, the time to finish."""
        if self.writer is not None:
            self.writer.close(_LAST_SECONDS)
