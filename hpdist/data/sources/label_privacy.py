"""What stored labels have cost the private rows that they were voted from.

`hpdist vote` writes it beside the labels; a run that learns from them keeps it in its folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdist.data.sources.label_files import PRIVACY, RECORD, WHERE
from hpdist.errors import DataError, one_line


def read_spent(folder: Path) -> dict[str, Any] | None:
    """Give what a folder of labels says that its vote has cost; None where it was no vote.

    Raises DataError where what it says cannot be understood.
    """
    for name in (RECORD, PRIVACY):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("privacy")
            if found is not None:
                return _checked(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{WHERE}: {file} does not say what the labels cost in privacy "
                f"({one_line(error)}); "
                "copy the folder that hpdist vote wrote again"
            ) from error
    return None


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    epsilon, delta = float(found["epsilon"]), float(found["delta"])
    if not (0 <= epsilon < math.inf and 0 <= delta < 1):
        raise ValueError(f"epsilon {epsilon:g} and delta {delta:g} are no bound")
    return {**found, "epsilon": epsilon, "delta": delta}


def add_up(spent: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the cost of several votes on the same private rows: epsilons and deltas add up."""
    return {
        "labels": list(spent),
        "epsilon": sum(one["epsilon"] for one in spent),
        "delta": sum(one["delta"] for one in spent),
    }


def describe(total: Mapping[str, Any]) -> str:
    """Say in a sentence what `add_up` gave."""
    votes = len(total["labels"])
    many = "a private vote has" if votes == 1 else f"{votes} private votes have"
    return (
        f"{many} labelled the unlabelled rows: epsilon {total['epsilon']:.4g} at delta "
        f"{total['delta']:.3g} for each private row of the teachers; each further vote on the same "
        "teachers adds to it"
    )
