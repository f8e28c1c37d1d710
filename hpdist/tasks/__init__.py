"""Tasks: what a label is, its loss, its pseudo-labels and its scores; one file each.

`base` is the contract; a new task needs only its own file. Those that come with hpdist are known
from here on.
"""

from __future__ import annotations

from typing import Any, cast

import hpdist.tasks.detection
import hpdist.tasks.multilabel
import hpdist.tasks.regression  # noqa: F401
from hpdist.config.component import ComponentOf
from hpdist.tasks.base import Task, TaskConfig
from hpdist.tasks.classification import Classification

DEFAULT_TASK = Classification()
"""The task of whoever names none."""


def choose_task(name: str = DEFAULT_TASK.name, **options: Any) -> TaskConfig:
    """Give the options of a task by its name, as a config's section has them.

    Raises pydantic's ValidationError where one is wrong.
    """
    chosen = ComponentOf(TaskConfig.kind).choose({"name": name, **options})
    return cast(TaskConfig, chosen)


def make_task(name: str = DEFAULT_TASK.name, **options: Any) -> Task:
    """Make a task by its name; raises as `choose_task` does."""
    return choose_task(name, **options).build()
