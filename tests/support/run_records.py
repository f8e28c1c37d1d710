"""What a run wrote into metrics.jsonl, for comparing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMED = {
    "examples_per_second",
    "examples_per_second_per_rank",
    "slowest_rank",
    "slowest_rank_lag",
    "data_wait",
    "checkpoint_wait",
}


def read(folder: Path) -> list[dict[str, Any]]:
    """Every record as it stands."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record without what depends on time; a list as one number for each of its places."""
    found = []
    for record in read(folder):
        flat: dict[str, Any] = {}
        for key, value in record.items():
            if key in TIMED:
                continue
            if isinstance(value, list):
                flat |= {f"{key}/{place}": part for place, part in enumerate(value)}
            else:
                flat[key] = value
        found.append(flat)
    return found
