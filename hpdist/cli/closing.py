"""The summary of a run as lines of text; `summary.json` has the same numbers unformatted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hpdist.messages.human import duration, percent, size

_LABEL = 28  # columns of a key


def summary_lines(summary: Mapping[str, object], folder: str | Path) -> Iterator[str]:
    """Lines with the keys of a summary and their values in units, the run folder last."""
    for key, value in summary.items():
        yield _line(key, _formatted(key, value, summary))
    if summary:
        yield _line("run folder", str(folder))


def _line(key: str, text: str) -> str:
    return f"{key:{_LABEL}} {text}"


def _formatted(key: str, value: object, summary: Mapping[str, object]) -> str:
    name = key.rpartition("/")[2]
    if value is None:
        return "none"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
        return str(value)
    if "accuracy" in name:
        return percent(value)
    if name == "seconds":
        return duration(value)
    if name == "examples":
        return f"{value:,}{_per_second(value, summary)}"
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _per_second(examples: float, summary: Mapping[str, object]) -> str:
    seconds = summary.get("seconds")
    if not isinstance(seconds, (int, float)) or seconds <= 0:
        return ""
    return f" ({examples / seconds:,.0f} a second)"
