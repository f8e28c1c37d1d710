"""What the person at the terminal sees: a progress bar there, plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from hpdist.errors import printable

HEADLINES = ("accuracy", "mean_average_precision", "rmse")
"""Scores that are shown, whichever of them a task has."""
_WIDTH = 80  # columns
_SHOWN = {
    "loss": "{:.3f}",
    "mask_rate": "{:.2f}",
    "loss_scale": "{:g}",
    **dict.fromkeys(HEADLINES, "{:.4f}"),
}


class Console:
    """Progress of a run of so many steps, from the main process only; of none there is no bar."""

    def __init__(self, steps: int, done: int, main: bool) -> None:
        self.main = main
        self._steps = steps
        self._started, self._first = time.monotonic(), done
        self._shown: dict[str, str] = {}
        self._bar: Any = None
        if main and steps and sys.stderr.isatty():
            # Of a terminal that does not say how wide it is tqdm would show nothing.
            sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            width = {"dynamic_ncols": True} if sized else {"ncols": _WIDTH}
            self._bar = tqdm(total=steps, initial=done, unit="step", **width)

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.main:
            return
        line = printable(line)
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        if not self.main:
            return
        for key, form in _SHOWN.items():
            if key in values and not (key == "loss_scale" and values[key] == 1):
                self._shown[key.replace("_", " ")] = form.format(values[key])
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            numbers = ", ".join(f"{key} {value}" for key, value in self._shown.items())
            self.say(f"step {step}/{self._steps}: {numbers}, {self._left(step)} left")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(step - self._first, 1)
        minutes, seconds = divmod(round(per_step * (self._steps - step)), 60)
        return f"{minutes}:{seconds:02d}"
