"""The output on the terminal: a progress bar there, plain lines in a log file."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from typing import Any

from hpdist.errors import printable
from hpdist.messages.human import duration, percent
from hpdist.messages.progress import columns, make_bar, print_line
from hpdist.messages.redaction import redacted_text

_SHOWN = {
    "loss": "{:.3f}",
    "mask_rate": "{:.2f}",
    "loss_scale": "{:g}",
}
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_BESIDES = len("100%|====| / [0:00:00<0:00:00]")
_LEAST = ("loss scale", "mask rate")  # dropped first on a narrow terminal


class Console:
    """Progress of a run of this many steps, on the main process; with 0 steps there is no bar.

    `scores` are those that are shown beside the other numbers; True says that a score is shown as a
    percentage.
    """

    def __init__(
        self, steps: int, done: int, main: bool, scores: Mapping[str, bool] | None = None
    ) -> None:
        self.main = main
        self._scores = dict(scores or {})
        self._steps = steps
        self._started, self._first = time.monotonic(), done
        self._shown: dict[str, str] = {}
        self._bar: Any = None
        if main and steps and columns():
            self._bar = make_bar(total=steps, initial=done, bar_format=_BAR)

    def log_line(self, line: str) -> None:
        """Print a line, above the bar if there is one; wrapped on a terminal."""
        if not self.main:
            return
        line, width = printable(redacted_text(line)), columns()
        if width is not None:
            line = "\n".join(part for own in line.split("\n") for part in wrapped(own, width))
        print_line(line)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        if not self.main:
            return
        for key, form in (_SHOWN | dict.fromkeys(self._scores, "{:.4f}")).items():
            if key in values and not (key == "loss_scale" and values[key] == 1):
                value = values[key]
                shown = percent(value) if self._scores.get(key) else form.format(value)
                self._shown[key.replace("_", " ")] = shown
        if self._bar is not None:
            self._bar.set_postfix(self._fitting, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            numbers = ", ".join(f"{key} {value}" for key, value in self._shown.items())
            self.log_line(f"step {step}/{self._steps}: {numbers}, {self._left(step)} left")

    def close(self) -> None:
        """Close the bar in its present state."""
        if self._bar is not None:
            self._bar.close()

    @property
    def _fitting(self) -> dict[str, str]:
        """The numbers that fit beside the bar, none of them cut."""
        room = (columns() or 0) - _BESIDES - 2 * len(str(self._steps))
        found: dict[str, str] = {}
        for key in sorted(self._shown, key=lambda key: key in _LEAST):
            room -= len(f", {key}={self._shown[key]}")
            if room < 0:
                break
            found[key] = self._shown[key]
        return found

    def _left(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(step - self._first, 1)
        return duration(round(per_step * (self._steps - step)))


def wrapped(line: str, width: int, indent: int = 2) -> list[str]:
    """Split a line into parts of at most so many columns; a word, such as a path, stays whole."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(
        line,
        max(width, indent + 20),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
