"""Draws a benchmark: score against latency, with points as large as the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpdist.errors import CheckpointError, ConfigError, why_not_written
from hpdist.evaluate.benchmark import Timed


def require_plot() -> Any:
    """Import matplotlib's figures. Raises ConfigError where it is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "benchmark draws its plot with matplotlib, which is missing; "
            "pip install 'hpdist[report]'"
        ) from error
    return Figure, FigureCanvasAgg


def draw(found: Sequence[Timed], place: Path) -> None:
    """Draw the candidates into a PNG file; simulated ones, whose time says nothing, are left out.

    Raises CheckpointError where the file cannot be written.
    """
    make_figure, make_canvas = require_plot()
    figure = make_figure(figsize=(7, 4.5), layout="constrained")
    make_canvas(figure)
    axes = figure.add_subplot()
    shown = [one for one in found if not one.measured.simulated and math.isfinite(one.score)]
    most = max((one.measured.bytes for one in shown), default=1)
    for one in shown:
        axes.scatter(one.median, one.score, s=600 * one.measured.bytes / most + 20, alpha=0.5)
        axes.annotate(
            f"{one.runs_on} {one.measured.precision}",
            (one.median, one.score),
            textcoords="offset points",
            xytext=(6, 6),
        )
    axes.set_xlabel(f"median milliseconds of a batch of {found[0].batch}")
    axes.set_ylabel(found[0].headline.replace("_", " "))
    axes.set_title("point size: bytes")
    axes.margins(0.2)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(place, format="png", dpi=150)
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be written: {why_not_written(error, place.parent)}"
        ) from error
