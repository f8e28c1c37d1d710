"""W&B, TensorBoard or MLflow by Accelerate's trackers; one that fails never stops the training."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import patch_environment

from hpdist.config import RunConfig
from hpdist.settings import flat
from hpdist.tracking.variables import (
    Chosen,
    choose_mlflow,
    choose_tensorboard,
    choose_wandb,
)

_GROUPS = {
    "precision": ("loss_scale", "overflows", "overflow"),
    "pseudo-labels": ("mask_rate", "confidence", "pseudo_label_top_share"),
    "stream": ("epoch", "bad_rows", "data_wait"),
    "system": (
        "examples_per_second",
        "examples_per_second_per_rank",
        "slowest_rank",
        "slowest_rank_lag",
        "checkpoint_wait",
    ),
}
_GROUP = {name: group for group, names in _GROUPS.items() for name in names}
_MOST_IN_TABLE = 100  # classes; a table has a line for each pair of them
_FEW = 20  # classes; of more, W&B has a histogram and the others nothing


class Tracker:
    """Sends global numbers from the main process; warns once and goes silent if that fails.

    Args:
        config: Of the run.
        folder: Of the run.
        main: Whether this is the main process; no other sends anything.
        run_id: The tracker's, of the run that goes on.
        environment: What else is told beside the config, such as the number of ranks.
        say: Is given a line of what the tracker's environment variables have decided.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        main: bool,
        run_id: str | None = None,
        environment: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._say = say
        self.run_id = run_id
        self._name = config.tracker.name
        self._tracker: GeneralTracker | None = None
        if main and self._name != "none":
            try:
                self._tracker = self._start(config, folder, environment or {})
            except Exception as error:
                self._give_up(self._name, error)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send the record of a step, numbers in groups; a list is of all classes or ranks."""
        self._try(lambda tracker: tracker.log(self._values(record), step=step))

    def note(self, key: str, text: str, step: int) -> None:
        """Send a line of text; MLflow takes numbers only."""
        if self._name != "mlflow":
            self._try(lambda tracker: tracker.log({grouped(key): text}, step=step))

    def log_confusions(self, confusions: Mapping[str, Any], step: int) -> None:
        """Send confusion matrices, by the name of the set; to W&B only, as tables."""
        # A task may have none.
        there = {
            name: confusion
            for name, confusion in confusions.items()
            if confusion and len(confusion["classes"]) <= _MOST_IN_TABLE
        }
        if there and self._name == "wandb":
            self._try(lambda tracker: tracker.log(_tables(there), step=step))

    def alert(self, title: str, text: str) -> None:
        """Tell whoever watches the run; of the trackers only W&B can."""
        if self._name == "wandb":
            self._try(lambda tracker: tracker.tracker.alert(title=title, text=text, level="WARN"))

    def finish(self) -> None:
        """Flush and close."""
        self._try(lambda tracker: tracker.finish())
        self._tracker = None

    def _values(self, record: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in record.items():
            if not isinstance(value, Sequence):
                values[grouped(key)] = value
                continue
            if len(value) <= _FEW:
                values |= {f"{grouped(key)}/{number}": part for number, part in enumerate(value)}
            if self._name == "wandb":
                values[f"{grouped(key)}/histogram"] = _histogram(value)
        return values

    def _start(
        self, config: RunConfig, folder: Path, environment: Mapping[str, Any]
    ) -> GeneralTracker | None:
        name = self._name
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed; pip install "hpdist[{name}]"')
        chosen, make = self._choose(config, folder)
        if chosen.line is not None:
            self._say(f"tracker {name}: {chosen.line}")
        if chosen.disabled:
            return None
        tracker = make(chosen)
        tracker.start()
        if name == "wandb":
            self.run_id = tracker.tracker.id
        elif name == "mlflow":
            self.run_id = tracker.active_run.info.run_id
        settings = flat(config.model_dump(mode="json"))
        # MLflow refuses to change the settings of a run that goes on.
        if name != "mlflow" or not tracker.active_run.data.params:
            tracker.store_init_configuration(settings | dict(environment))
        return tracker

    def _choose(
        self, config: RunConfig, folder: Path
    ) -> tuple[Chosen, Callable[[Chosen], GeneralTracker]]:
        """What the tracker is told, and how one is made of it."""
        settings, run = config.tracker, config.run.name
        if self._name == "tensorboard":
            return (
                choose_tensorboard(settings, folder, run),
                lambda c: TensorBoardTracker(c.project, **c.arguments),
            )
        if self._name == "mlflow":
            return choose_mlflow(settings, folder, self.run_id), lambda c: _mlflow(c, run)
        os.environ.setdefault("WANDB_SILENT", "true")
        return (
            choose_wandb(settings, folder, run, self.run_id),
            lambda c: WandBTracker(c.project, **c.arguments),
        )

    def _try(self, act: Callable[[GeneralTracker], object]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:
            self._give_up(self._name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._tracker = None
        warnings.warn(
            f"tracker {name} failed and is off for the rest of the run ({type(error).__name__}: "
            f"{error}); training goes on, and metrics.jsonl has every number",
            stacklevel=3,
        )


def _mlflow(chosen: Chosen, name: str | None) -> MLflowTracker:
    """Accelerate's tracker, which would put the variables over what it is given."""
    theirs = {"MLFLOW_EXPERIMENT_NAME": chosen.project, "MLFLOW_RUN_ID": chosen.arguments["run_id"]}
    with patch_environment(**{key: value for key, value in theirs.items() if value is not None}):
        return MLflowTracker(chosen.project, run_name=name, **chosen.arguments)


def grouped(key: str) -> str:
    """The name under which a tracker has a number of metrics.jsonl: `group/number`."""
    if "/" in key:
        return key
    if key.startswith(("threshold", "pseudo_label")):
        return f"pseudo-labels/{key}"
    return f"{_GROUP.get(key, 'train')}/{key}"


def _histogram(values: Sequence[float]) -> Any:
    """A bar for each class."""
    import wandb

    return wandb.Histogram(np_histogram=(list(values), list(range(len(values) + 1))))


def _tables(confusions: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's confusion matrices, a line for each pair of classes."""
    import wandb

    tables = {}
    for name, confusion in confusions.items():
        classes = confusion["classes"]
        rows = [
            [classes[true], classes[said], count]
            for true, counts in enumerate(confusion["teacher"])
            for said, count in enumerate(counts)
        ]
        tables[f"eval/{name}/confusion"] = wandb.Table(["class", "predicted", "rows"], rows)
    return tables
