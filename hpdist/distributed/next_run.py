"""A second run in one process: Accelerate keeps the first one's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Inside, an Accelerator can be made and prepare a model as if it were the process's first.

    Its state is shared by all Accelerators of a process, and refuses another precision; and it
    writes some arguments into the environment, where the next run would take them for the
    launcher's. The process group stays.
    """
    launched = _environment()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        for key in _environment().keys() - launched.keys():
            del os.environ[key]
        os.environ.update(launched)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
