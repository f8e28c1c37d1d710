"""Numbers formatted for people; output for programs (JSON, trackers) has the raw ones."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `12 s`, `3 min 20 s`, `2 h 03 min` or `5 d 2 h`."""
    if seconds < 9.95 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """Bytes as `512 B` or `1.25 GiB`."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.2f} {_UNITS[unit]}"


def percent(share: float) -> str:
    """A share as `97.22 %`."""
    return f"{100 * share:.2f} %"


def counted(count: int, noun: str) -> str:
    """A number of things, `1 rank` or `1,024 ranks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown_numbers(value: object) -> str:
    """Write a number, or a list of them, for a message."""
    numbers = value if isinstance(value, list) else [value]
    text = ", ".join(f"{number:.4g}" for number in numbers)
    return f"[{text}]" if isinstance(value, list) else text
