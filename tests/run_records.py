"""What a run wrote into metrics.jsonl, for comparing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMED = {"examples_per_second", "data_wait", "checkpoint_wait"}


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record without what depends on time; a list as one number for each of its places."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        flat: dict[str, Any] = {}
        for key, value in json.loads(line).items():
            if isinstance(value, list):
                flat |= {f"{key}/{place}": part for place, part in enumerate(value)}
            elif key not in TIMED:
                flat[key] = value
        found.append(flat)
    return found
