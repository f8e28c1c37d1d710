"""How a stored value is written: as a class or a category, as a mark of none, in a message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any

import numpy as np

from hpdist.errors import printable

_SHOWN = 12  # names that a message has
_LONGEST = 80  # characters of each


def spelling(value: Any) -> str | None:
    """Write a label as the name of a class; None of a number that is not whole."""
    if isinstance(value, (float, Decimal, np.floating)):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, datetime):  # also pandas' Timestamp; one at midnight is that day
        if value.tzinfo is not None:
            return value.astimezone(timezone.utc).isoformat()
        return value.isoformat().removesuffix("T00:00:00")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = "\0"
        return f"0x{value.hex()}" if "\0" in text else text  # no text, such as a UUID's bytes
    return str(value)


def is_mark(value: Any, minus_one: bool = False) -> bool:
    """Whether a value says that its row has no label; with `minus_one`, -1 does too."""
    if value is None or value != value or (minus_one and is_minus_one(value)):
        return True
    return isinstance(value, (str, bytes)) and not value.strip()


def is_minus_one(value: Any) -> bool:
    """Whether it is the mark of scikit-learn for a row without a label, also as text."""
    return value in (-1, "-1", b"-1")


def shortened(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    shown = [printable(name, _LONGEST) for name in names[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")
