"""Shows in a report what a run's privately voted labels have cost."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

_COLUMNS = ("folder", "mechanism", "teachers", "answers", "sigma", "epsilon", "delta")


def privacy_html(spent: Mapping[str, Any], run: str) -> str:
    """Give the part of a report that shows what `privacy.json` says."""
    lines = ["".join(f"<th>{column}</th>" for column in _COLUMNS)]
    lines += [
        "".join(f"<td>{html.escape(_formatted(one.get(column)))}</td>" for column in _COLUMNS)
        for one in spent["labels"]
    ]
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<h2>Privacy of the voted labels: {html.escape(run)}</h2>"
        f"<p>Together epsilon {_formatted(spent['epsilon'])} at delta "
        f"{_formatted(spent['delta'])} for each private row of the teachers. Each further vote on "
        f'the same teachers adds to it.</p><div class="wide"><table>{rows}</table></div>'
    )


def _formatted(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
