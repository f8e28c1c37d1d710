"""One model in several precisions: loaded, measured, and written down as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdist.errors import CheckpointError, ConfigError, why_not_written
from hpdist.evaluate.measure import Measured
from hpdist.evaluate.precision import PRECISIONS, SIMULATED
from hpdist.evaluate.predictor import Predictor
from hpdist.messages.human import counted, duration, size

EVALUATION = "evaluation.json"
_FULL = "fp32"


def parse_precisions(text: str) -> list[str]:
    """Read a list of precisions, such as `fp32,bf16`, each once. Raises ConfigError."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in found if name not in PRECISIONS]
    if wrong or not found:
        raise ConfigError(
            f"--precision: {', '.join(wrong) or 'nothing'} is none of {', '.join(PRECISIONS)}; "
            "separate several by commas"
        )
    return found


def in_precisions(loaded: Predictor, wanted: Sequence[str]) -> list[Predictor]:
    """Give the model in fp32, which others are compared with, and in every other one wanted.

    A file that another program runs has one precision only, and is measured in that.
    """
    if loaded.backend is not None:
        return [loaded]
    return [loaded, *(loaded.with_precision(name) for name in wanted if name != _FULL)]


def table(found: Sequence[Measured], in_percent: frozenset[str] = frozenset()) -> str:
    """Lay out what was measured, a line for each precision.

    `in_percent` are scores that people read as a percentage.
    """
    names = list(found[0].scores.values)
    head = ["precision", *names, "agreement", "largest difference", "seconds", "weights"]
    lines = [head, *(_cells(one, names, in_percent) for one in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*shown, *_notes(found)])


def _cells(one: Measured, names: Sequence[str], in_percent: frozenset[str]) -> list[str]:
    scores = [_score(one.scores.values[name], name in in_percent) for name in names]
    agreement = "" if one.agreement is None else f"{100 * one.agreement:.2f} %"
    seconds = f"{one.seconds:.3f}" + ("*" if one.simulated else "")
    difference = f"{one.largest_difference:.2e}"
    return [one.precision, *scores, agreement, difference, seconds, size(one.bytes)]


def _score(value: float, in_percent: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.2f} %" if in_percent else f"{value:.4f}"


def _notes(found: Sequence[Measured]) -> list[str]:
    """What must be known of the numbers above."""
    notes = [f"* {SIMULATED}"] if any(one.simulated for one in found) else []
    for one in found:
        if one.not_finite:
            rows = counted(one.not_finite, "row")
            notes.append(
                f"note: in {one.precision}, outputs of {rows} are NaN or infinite: it leaves the "
                "precision's range; use bf16"
            )
    if found[0].bad_rows:
        rows = counted(found[0].bad_rows, "row")
        notes.append(f"note: {rows} could not be decoded and are left out of every score")
    return notes


def report(
    loaded: Predictor, found: Sequence[Measured], data: str, *, world_size: int
) -> dict[str, Any]:
    """Give what `evaluation.json` holds.

    `found` begins with the precision that the others are compared with; `data` says what was
    measured on.
    """
    first = found[0]
    return {
        "model": str(loaded.source),
        "run": {"id": loaded.run_id, "name": loaded.description.run.name},
        "step": loaded.step,
        "which": loaded.description.which,
        "data": data,
        "rows": first.rows,
        "bad_rows": first.bad_rows,
        "world_size": world_size,
        "device": str(loaded.device),
        "names": list(loaded.names),
        "results": {one.precision: one.to_json() for one in found},
    }


def place_of(model: Path, out: str | None) -> Path | None:
    """Where `evaluation.json` goes: `out`, else the run folder; None where there is none."""
    if out is not None:
        return Path(out)
    for folder in (model, *list(model.absolute().parents)[:2]):
        if (folder / "config.yaml").is_file() and folder.is_dir():
            return folder / EVALUATION
    return None


def write_report(values: Mapping[str, Any], place: Path) -> None:
    """Write the report. Raises CheckpointError where that fails."""
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(place)
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be written: {why_not_written(error, place.parent)}"
        ) from error


def summary_line(loaded: Predictor, rows: int, seconds: float) -> str:
    """Say what was measured, above the table."""
    step = "" if loaded.step is None else f" of step {loaded.step}"
    chosen = {"best": ", the best on the validation set", "last": ", the last"}
    why = chosen.get(str(loaded.description.chosen), "")
    which = loaded.description.which
    return f"{loaded.source}: the {which}{step}{why}; {counted(rows, 'row')} in {duration(seconds)}"
