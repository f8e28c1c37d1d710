"""W&B, TensorBoard or MLflow through Accelerate's trackers; failures never stop the training.

If a tracker refuses a metric, that metric is dropped; if it cannot be reached, the tracker is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import patch_environment
from PIL import Image

from hpdist.config.section import flat
from hpdist.messages.redaction import redacted_settings, redacted_text
from hpdist.tracking.config import Tracker as TrackerConfig
from hpdist.tracking.metrics import confusion_rows, grouped, histograms_of, values_of
from hpdist.tracking.variables import (
    Chosen,
    choose_mlflow,
    choose_tensorboard,
    choose_wandb,
)

_NAMED = 3  # metrics named in a warning
_LONGEST = 300  # characters of a library's error
_LARGE = 1e30  # that every tracker can store


class Tracker:
    """Sends global numbers from the main process; warns once and stops sending on failure.

    Args:
        config: The tracker and its settings.
        run: The run's name.
        settings: The whole run's, nested, for the tracker; passwords are left out.
        folder: Of the run.
        main: Whether this is the main process; no other sends anything.
        run_id: The tracker's id of a continued run.
        environment: Further facts beside the config, such as the number of ranks.
        classes: Their names, for the curves of classes.
        log: Receives a line on decisions by the tracker's environment variables.
    """

    def __init__(
        self,
        config: TrackerConfig,
        run: str | None,
        settings: Mapping[str, Any],
        folder: Path,
        main: bool,
        run_id: str | None = None,
        environment: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._log_line = log
        self.run_id = run_id
        self._classes = classes
        self._refused: set[str] = set()  # metrics
        self._name = config.name
        self._tracker: GeneralTracker | None = None
        if main and self._name != "none":
            try:
                self._tracker = self._start(config, run, settings, folder, environment or {})
            except Exception as error:
                self._give_up(self._name, error)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send the record of a step, numbers in groups; lists are of all classes or ranks."""

        def values() -> dict[str, Any]:
            bars = histograms_of(record).items() if self._name == "wandb" else ()
            return values_of(record, self._classes) | {name: _histogram(b) for name, b in bars}

        self._send(values, step)

    def note(self, key: str, text: str, step: int) -> None:
        """Send a line of text; MLflow takes numbers only."""
        if self._name != "mlflow":
            self._send(lambda: {grouped(key): redacted_text(text)}, step)

    @property
    def has_tables(self) -> bool:
        """Whether this process sends confusion matrices anywhere."""
        return self._tracker is not None and self._name == "wandb"

    def log_confusions(self, confusions: Mapping[str, Any], step: int) -> None:
        """Send confusion matrices, by the name of the set; to W&B only, as tables."""
        if not self.has_tables:
            return
        there = {
            name: matrix for name, matrix in confusions.items() if matrix
        }  # some tasks have none
        self._send(
            lambda: {f"eval/{name}/confusion": _table(own) for name, own in there.items()}, step
        )

    def log_picture(self, key: str, file: Path, step: int) -> None:
        """Send a PNG; MLflow takes it as a file of the run."""

        def send(tracker: GeneralTracker) -> None:
            if self._name == "mlflow":
                tracker.log_artifact(str(file))
                return
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            layout = {"dataformats": "NHWC"} if self._name == "tensorboard" else {}
            tracker.log_images({key: pixels}, step=step, **layout)

        self._try(send, [key])

    def alert(self, title: str, text: str) -> None:
        """Alert the user; only W&B supports it."""
        if self._name == "wandb":
            alert_text = {"title": title, "text": redacted_text(text), "level": "WARN"}
            self._try(lambda tracker: tracker.tracker.alert(**alert_text))

    def finish(self) -> None:
        """Flush and close."""
        self._try(lambda tracker: tracker.finish())
        self._tracker = None

    def _start(
        self,
        config: TrackerConfig,
        run: str | None,
        settings: Mapping[str, Any],
        folder: Path,
        environment: Mapping[str, Any],
    ) -> GeneralTracker | None:
        name = self._name
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is not installed; pip install "hpdist[{name}]"')
        chosen, make = self._choose(config, run, folder)
        if chosen.line is not None:
            self._log_line(f"tracker {name}: {chosen.line}")
        if chosen.disabled:
            return None
        tracker = make(chosen)
        with _redacted_arguments():
            tracker.start()
        if name == "wandb":
            self.run_id = tracker.tracker.id
        elif name == "mlflow":
            self.run_id = tracker.active_run.info.run_id
        stored = flat(redacted_settings(settings))
        # MLflow refuses to change the settings of a continued run.
        if name != "mlflow" or not tracker.active_run.data.params:
            self._store(tracker, stored | flat(environment))
        return tracker

    def _choose(
        self, settings: TrackerConfig, run: str | None, folder: Path
    ) -> tuple[Chosen, Callable[[Chosen], GeneralTracker]]:
        """The arguments for the tracker, and how it is made."""
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

    def _store(self, tracker: GeneralTracker, settings: Mapping[str, Any]) -> None:
        """Send the settings; a tracker that refuses them can still receive the numbers."""
        try:
            tracker.store_init_configuration(settings)
        except Exception as error:
            warnings.warn(
                f"tracker {self._name} refuses the run's settings ({_cause(error)}); "
                "config.yaml has them",
                stacklevel=4,
            )

    def _send(self, make: Callable[[], Mapping[str, Any]], step: int) -> None:
        """Log values together; if that fails, one by one, to find those that are refused."""
        if self._tracker is None:
            return
        values: dict[str, Any] = {}
        try:
            values |= {name: v for name, v in make().items() if name not in self._refused}
            if values:
                self._tracker.log(values, step=step)
            return
        except Exception as error:
            first = error
        errors = {name: self._refusal(name, value, step) for name, value in values.items()}
        refused = {name: error for name, error in errors.items() if error is not None}
        # If it refuses a number that any tracker takes, it cannot be reached any more.
        if not values or (len(refused) == len(values) and any(map(_is_plain, values.values()))):
            self._give_up(self._name, first)
        elif refused:
            self._leave_out(refused, next(iter(refused.values())))

    def _refusal(self, name: str, value: Any, step: int) -> Exception | None:
        try:
            if self._tracker is not None:
                self._tracker.log({name: value}, step=step)
        except Exception as error:
            return error
        return None

    def _try(self, act: Callable[[GeneralTracker], object], metrics: Iterable[str] = ()) -> None:
        """Use the tracker; a failure drops these metrics, or else the tracker."""
        metrics = [name for name in metrics if name not in self._refused]
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:
            if metrics:
                self._leave_out(metrics, error)
            else:
                self._give_up(self._name, error)

    def _leave_out(self, names: Iterable[str], error: Exception) -> None:
        names = list(names)
        self._refused.update(names)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"tracker {self._name} refuses {', '.join(names[:_NAMED])}{more}, which are not sent "
            f"any more ({_cause(error)}); metrics.jsonl has every number",
            stacklevel=4,
        )

    def _give_up(self, name: str, error: Exception) -> None:
        self._tracker = None
        warnings.warn(
            f"tracker {name} failed and is off for the rest of the run ({_cause(error)}); training "
            "continues, and metrics.jsonl has every number",
            stacklevel=3,
        )


def _mlflow(chosen: Chosen, name: str | None) -> MLflowTracker:
    """Accelerate's tracker; it would prefer the variables to its arguments."""
    theirs = {"MLFLOW_EXPERIMENT_NAME": chosen.project, "MLFLOW_RUN_ID": chosen.arguments["run_id"]}
    with patch_environment(**{key: value for key, value in theirs.items() if value is not None}):
        return MLflowTracker(chosen.project, run_name=name, **chosen.arguments)


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """Show a tracker that records the command line one without secrets."""
    given = sys.argv
    sys.argv = [redacted_text(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {redacted_text(' '.join(str(error).split()))}"[:_LONGEST]


def _is_plain(value: object) -> bool:
    return isinstance(value, (int, float)) and -_LARGE < value < _LARGE


def _histogram(bars: tuple[Sequence[float], Sequence[int]]) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=(list(bars[0]), list(bars[1])))


def _table(confusion: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Table(["class", "predicted", "rows"], confusion_rows(confusion))
