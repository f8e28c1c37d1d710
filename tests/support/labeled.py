"""Labelled sets for tests of what is not about tasks: their labels are the default task's."""

from __future__ import annotations

from typing import Any

from hpdist.data.sources import labeled
from hpdist.data.sources.labeled import LabeledRows
from hpdist.tasks import DEFAULT_TASK


def open_labeled(config: Any, seed: int, **options: Any) -> LabeledRows:
    """Open a labelled set as `hpdist.data.sources.labeled.open_labeled` does."""
    return labeled.open_labeled(config, seed, **{"labels": DEFAULT_TASK} | options)
