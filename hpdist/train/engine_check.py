"""A run's engine is checked at its first start, and the run folder remembers that it was right."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.gradient_check import engine_facts, needs_check, require_right_gradients
from hpdist.errors import CheckpointError
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.config import RunConfig

FILE = "gradient_check.json"
"""The file of a run folder with the engine that was found right, and its error."""


def check_engine(
    config: RunConfig, accelerator: Accelerator, plan: ExecutionPlan, folder: RunFolder
) -> dict[str, Any] | None:
    """Compare one step of the run's engine with one process, unless the folder has the outcome.

    Returns what `record_engine` is to write; None where nothing was checked. Raises ConfigError on
    all ranks if the engine computes wrong gradients. Collective: every rank must call.
    """
    if not needs_check(plan):
        return None
    facts = engine_facts(plan) | {"checkpointed": config.activation_checkpointing}
    known = run_on_main(lambda: _engine_known(folder))
    if known == facts:
        return None
    found = require_right_gradients(accelerator, plan, checkpointed=config.activation_checkpointing)
    return {"engine": facts, "error": found.error}


def record_engine(folder: RunFolder, checked: dict[str, Any] | None) -> None:
    """Write what `check_engine` returned. Collective: every rank must call."""
    if checked is not None:
        call_on_all_ranks(lambda: folder.write_json(FILE, checked))


def _engine_known(folder: RunFolder) -> Any:
    """The engine that was checked in this run before; None if none was, or the file is damaged."""
    try:
        found = folder.read_json(FILE, lambda found: isinstance(found, dict))
    except CheckpointError:  # checking again costs less than any advice
        return None
    return None if found is None else found.get("engine")
