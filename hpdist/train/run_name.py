"""A name for a run without one, such that it never continues another run by accident."""

from __future__ import annotations

import itertools
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from hpdist.distributed.collectives import run_on_main
from hpdist.distributed.launcher_watch import find_launcher
from hpdist.errors import CheckpointError, why_not_written
from hpdist.tracking.console import Console
from hpdist.tracking.run_folder import LAUNCH
from hpdist.train.config import RunConfig

_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"  # torchrun's, and Accelerate's
_RESTARTED = "TORCHELASTIC_RESTART_COUNT"


def with_fresh_name(config: RunConfig, main: bool) -> RunConfig:
    """Return the config with the name of a run folder that is made now.

    If a launcher restarts its processes after a failure, they find the folder that they had.
    Collective: every rank must call; raises CheckpointError, on all, if none can be made.
    """
    name = run_on_main(lambda: _restarted(Path(config.run.dir)) or _fresh(Path(config.run.dir)))
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    Console(0, 0, main).log_line(
        f"no run.name was given: this run is {config.run.folder}; continue it later with "
        f"run={{'name': {name!r}}}"
    )
    return config


def _fresh(folder: Path) -> str:
    """Make the first folder that does not exist yet; two processes never get the same."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            name = f"run-{number:04d}"
            with suppress(FileExistsError):
                (folder / name).mkdir()
                break
        launch = _launch()
        if launch is not None and os.environ.get(_RESTARTS, "0") != "0":
            (folder / name / LAUNCH).write_text(json.dumps(launch), encoding="utf-8")
    except OSError as error:
        why = why_not_written(error, folder)
        raise CheckpointError(
            f"run.dir: cannot make a run folder in {str(folder)!r}: {why}"
        ) from error
    return name


def _restarted(folder: Path) -> str | None:
    """The folder of the processes that this launcher started before, if there is one."""
    launch = _launch()
    if launch is None or os.environ.get(_RESTARTED, "0") == "0":
        return None
    for mark in sorted(folder.glob(f"run-*/{LAUNCH}"), reverse=True):
        with suppress(OSError, ValueError):
            if json.loads(mark.read_text(encoding="utf-8")) == launch:
                return mark.parent.name
    return None


def _launch() -> dict[str, object] | None:
    """Identify the launcher of this process; a launcher of another time has another start."""
    launcher = find_launcher()
    if launcher is None:
        return None
    with suppress(psutil.Error):
        started = psutil.Process(launcher.pid).create_time()
        return {"host": socket.gethostname(), "pid": launcher.pid, "started": started}
    return None
