"""W&B or TensorBoard through Accelerate's trackers; one that fails never stops the training."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from hpdist.config import RunConfig
from hpdist.settings import flat


class Tracker:
    """Sends global numbers from the main process; warns once and goes silent if that fails."""

    def __init__(
        self, config: RunConfig, folder: Path, main: bool, run_id: str | None = None
    ) -> None:
        self.run_id = run_id
        self._tracker: GeneralTracker | None = None
        if main and config.tracker.name != "none":
            try:
                self._tracker = self._start(config, folder)
            except Exception as error:
                self._give_up(config.tracker.name, error)

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Send one record."""
        self._try("log", dict(values), step=step)

    def finish(self) -> None:
        """Flush and close."""
        self._try("finish")
        self._tracker = None

    def _start(self, config: RunConfig, folder: Path) -> GeneralTracker:
        name = config.tracker.name
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed; pip install "hpdist[{name}]"')
        if name == "tensorboard":
            tracker: GeneralTracker = TensorBoardTracker(config.tracker.project, folder)
        else:
            os.environ.setdefault("WANDB_SILENT", "true")
            tracker = WandBTracker(
                config.tracker.project,
                dir=str(folder),
                name=config.run.name,
                mode=config.tracker.mode,
                id=self.run_id,
                resume="allow",
            )
        tracker.start()
        if name == "wandb":
            self.run_id = tracker.tracker.id
        tracker.store_init_configuration(flat(config.model_dump(mode="json")))
        return tracker

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*args, **kwargs)
        except Exception as error:
            self._give_up(type(self._tracker).__name__, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._tracker = None
        warnings.warn(
            f"tracker {name} failed and is off for the rest of the run ({type(error).__name__}: "
            f"{error}); training goes on, and metrics.jsonl has every number",
            stacklevel=3,
        )
