"""The settings in a run folder: those at the beginning, and the changes since.

`config.yaml` is never rewritten: it describes how the weights began. If a run continues with other
settings, a line of `config_changes.jsonl` records from which step on they hold:

    {"step": 200, "settings": {"optim.lr": {"was": 0.03, "now": 0.003}}}
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hpdist.config.section import flat
from hpdist.errors import CheckpointError, ConfigError
from hpdist.messages.redaction import redacted_settings
from hpdist.tracking.run_folder import CHANGES, RunFolder, read_records
from hpdist.train import config as configuration
from hpdist.train.config import RunConfig

CONFIG = "config.yaml"
_ELSEWHERE = ("run.dir", "run.name", "run.wait")  # not settings of the training
_SHOWN = 5  # settings named in a message


def begin_config(folder: RunFolder, config: RunConfig) -> None:
    """Record the settings of a new run. Raises CheckpointError if that fails."""
    folder.write_text(CONFIG, config.to_yaml())
    if folder.main:
        (folder.path / CHANGES).unlink(missing_ok=True)  # of a run without a checkpoint


def continue_config(folder: RunFolder, config: RunConfig, step: int) -> str | None:
    """Record what differs in a run that continues from a step; return it as a message.

    Earlier records of this step and later ones are dropped, since those steps are repeated. For the
    main process only. Raises CheckpointError if that fails.
    """
    if not (folder.path / CONFIG).exists():
        folder.write_text(CONFIG, config.to_yaml())
        return None
    path = folder.path / CHANGES
    kept = [record for record in _recorded(path) if record["step"] < step]
    found = differences(folder, config, kept)
    if found:
        kept.append({"step": step, "settings": found})
    if kept or path.exists():
        folder.write_text(CHANGES, "".join(json.dumps(record) + "\n" for record in kept))
    if not found:
        return None
    return f"other settings from step {step} on: {describe_differences(found)} ({CHANGES})"


def differences(
    folder: RunFolder, config: RunConfig, changes: list[dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """The settings that differ from those of the run so far, by their dotted names."""
    if changes is None:
        changes = _recorded(folder.path / CHANGES)
    before = _began_with(folder)
    for record in changes:
        before |= {key: change["now"] for key, change in record["settings"].items()}
    now = flat(redacted_settings(config.model_dump(mode="json")))
    keys = [key for key in {**before, **now} if key not in _ELSEWHERE]
    return {
        key: {"was": before.get(key), "now": now.get(key)}
        for key in keys
        if before.get(key) != now.get(key)
    }


def _recorded(path: Path) -> list[dict[str, Any]]:
    """The recorded changes, as far as this module wrote them."""
    records = [record for _, record in read_records(path)] if path.exists() else []
    return [record for record in records if _is_change(record.get("settings"))]


def _is_change(settings: Any) -> bool:
    return isinstance(settings, dict) and all(
        isinstance(change, dict) and "now" in change for change in settings.values()
    )


def describe_differences(found: dict[str, dict[str, Any]]) -> str:
    """Describe changes in a message."""
    named = [f"{key} {change['was']} -> {change['now']}" for key, change in found.items()]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _began_with(folder: RunFolder) -> dict[str, Any]:
    path = folder.path / CONFIG
    values = None
    if path.exists():
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no settings")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{path}: the run's settings cannot be read: {' '.join(str(error).split())}; "
                "restore the file from a copy, or choose another run.name"
            ) from error
    with suppress(ConfigError):  # an earlier version had fewer settings; defaults applied
        values = configuration.parse(values or {}).model_dump(mode="json")
    return flat(values or {})
