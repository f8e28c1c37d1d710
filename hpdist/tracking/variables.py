"""A tracker's environment variables: they override hpdist's defaults, and the config them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdist.tracking.config import Tracker

_MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
    "shared": "shared",
}
_PROJECT = "hpdist"
_TRUE = ("true", "1", "yes", "y", "on", "t")
_BY_WANDB = (  # read by W&B itself, unless it gets arguments
    "WANDB_ENTITY",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_TAGS",
    "WANDB_NOTES",
    "WANDB_BASE_URL",
)


@dataclass
class Chosen:
    """The arguments of a tracker, and the variables that decided some."""

    project: str = _PROJECT
    arguments: dict[str, Any] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)

    @property
    def line(self) -> str | None:
        """A message on the decisions; None if no variable is set."""
        return ", ".join(self.decisions) or None

    @property
    def disabled(self) -> bool:
        """Whether nothing is sent or stored."""
        return self.arguments.get("mode") == "disabled"

    def take(self, setting: str, ours: str | None, variable: str, default: str) -> str:
        """Choose the config's setting, else the variable, else the default; record which."""
        theirs = os.environ.get(variable)
        if not theirs:
            return ours or default
        if ours is not None:
            if ours != theirs:
                self.decisions.append(f"tracker.{setting}: {ours} of the config, over {variable}")
            return ours
        self.decisions.append(f"{setting} {theirs} by {variable}")
        return theirs

    def take_run_id(self, saved: str | None, variable: str) -> str | None:
        """Choose the continued run, else the one that the variable names."""
        theirs = os.environ.get(variable) or None
        if saved is not None and theirs not in (None, saved):
            self.decisions.append(f"run {saved} of the checkpoint continues, over {variable}")
        elif saved is None and theirs is not None:
            self.decisions.append(f"run {theirs} by {variable}")
        return saved or theirs


def choose_wandb(config: Tracker, folder: Path, name: str | None, run_id: str | None) -> Chosen:
    """Choose the arguments of `wandb.init`. Raises ValueError for an unknown mode."""
    chosen = Chosen()
    mode = chosen.take("mode", config.mode, "WANDB_MODE", "offline")
    if mode not in _MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}, and must be one of {', '.join(_MODES)}")
    mode = _MODES[mode]
    if config.mode is None and os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        mode = "disabled"
        chosen.decisions.append("disabled by WANDB_DISABLED")
    chosen.project = chosen.take("project", config.project, "WANDB_PROJECT", _PROJECT)
    chosen.arguments = {"mode": mode, "id": chosen.take_run_id(run_id, "WANDB_RUN_ID")}
    ours = {
        "dir": ("folder", "WANDB_DIR", str(folder)),
        "name": ("name", "WANDB_NAME", name),
        "resume": ("resume", "WANDB_RESUME", "allow"),
    }
    for argument, (what, variable, default) in ours.items():
        if os.environ.get(variable):  # W&B reads it if the argument is left out
            chosen.decisions.append(f"{what} {os.environ[variable]} by {variable}")
        else:
            chosen.arguments[argument] = default
    set_ones = [variable for variable in _BY_WANDB if os.environ.get(variable)]
    if set_ones:
        chosen.decisions.append(f"and {', '.join(set_ones)}")
    return chosen


def choose_mlflow(config: Tracker, folder: Path, run_id: str | None) -> Chosen:
    """Choose experiment and run of MLflow; set where it stores, unless that is set."""
    chosen = Chosen()
    chosen.project = chosen.take("project", config.project, "MLFLOW_EXPERIMENT_NAME", _PROJECT)
    chosen.arguments = {"run_id": chosen.take_run_id(run_id, "MLFLOW_RUN_ID")}
    if os.environ.get("MLFLOW_TRACKING_URI"):
        chosen.decisions.append("stored where MLFLOW_TRACKING_URI says")
    else:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    return chosen


def choose_tensorboard(config: Tracker, folder: Path, name: str | None) -> Chosen:
    """Choose the folder of TensorBoard's events; transformers has a variable for it."""
    chosen = Chosen(project=config.project or _PROJECT)
    theirs = os.environ.get("TENSORBOARD_LOGGING_DIR")
    chosen.arguments = {"logging_dir": str(Path(theirs, name or "run") if theirs else folder)}
    if theirs:
        chosen.decisions.append(f"folder {theirs} by TENSORBOARD_LOGGING_DIR")
    return chosen
