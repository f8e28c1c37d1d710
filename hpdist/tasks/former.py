"""What tasks were asked for before each was a file of its own: for one release, by the old names.

`hpdist.aliases` leads here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpdist.config.component import components
from hpdist.tasks import DEFAULT_TASK, choose_task
from hpdist.tasks.base import Task, TaskConfig
from hpdist.tasks.metrics import Meter

if TYPE_CHECKING:
    from hpdist.data.sources.classes import StoredLabels
    from hpdist.data.sources.label_encoding import Encoding

CLASSIFICATION = DEFAULT_TASK
ALL = tuple(components(TaskConfig.kind))
TaskChoice = choose_task


def make_task(name: str, threshold: float = 0.5, spread: tuple[float, ...] | None = None) -> Task:
    """Make the task of a name: `threshold` is that of several labels, `spread` that of numbers."""
    task = choose_task(name).build()
    for option, value in (("threshold", threshold), ("std", spread)):
        if hasattr(task, option):
            setattr(task, option, value)
    return task


def make_meter(task: Task, classes: int, device: torch.device | str) -> Meter:
    """Make what collects a task's scores, of outputs [rows, classes]."""
    return task.meter(torch.zeros(0, classes, device=device))


def find_encoding(
    task: Any,
    stored: StoredLabels,
    num_classes: int | None,
    recorded: Sequence[str] | None = None,
) -> Encoding:
    """Say how the labelled split's column is read; `task` is a config's section."""
    encoding: Encoding = task.build().find_encoding(stored, num_classes, recorded)
    return encoding
