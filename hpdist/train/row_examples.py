"""Writes the rows of a run's measured set that are worth a look, for its report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import kind_named
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.structures import Structure, narrow
from hpdist.data.views import Views
from hpdist.distributed.collectives import gathered_on_main
from hpdist.evaluate.row_outcomes import RowOutcomes, choose_rows, chosen_rows
from hpdist.tasks.base import Task
from hpdist.tasks.row_choices import OutcomeTable, RowChoice
from hpdist.tracking.row_examples import RowExamples, RowGroup, ShownRow

_LONGEST = 600  # characters of a text


def gather_outcomes(task: Task, outcomes: RowOutcomes, names: Sequence[str]) -> OutcomeTable | None:
    """Give the rows of all ranks that any group may have, on rank 0 only. Collective."""
    everyone = gathered_on_main(chosen_rows(task, outcomes.table(), names))
    return None if everyone is None else OutcomeTable.join(everyone)


def make_examples(
    name: str, task: Task, table: OutcomeTable, rows: LabeledRows, spec: InputSpec, views: Views
) -> RowExamples:
    """Read the chosen rows of a set again, and make what is shown of them.

    Raises DataError where one cannot be read.
    """
    groups = [
        RowGroup(choice.title, [_shown(task, table, choice, int(p), rows) for p in places])
        for choice, places in choose_rows(task, table, rows.classes.names)
    ]
    ids = sorted({row.id for group in groups for row in group.rows}, key=int)
    media = {}
    for row in ids:
        values = rows.read_split([int(row)])
        decoded = spec.decode_rows(values, [int(row)], rows.name, rows.describe)
        media[row] = _make_media(spec, views, values[0], decoded)
    return RowExamples(name, groups, media)


def _shown(
    task: Task, table: OutcomeTable, choice: RowChoice, place: int, rows: LabeledRows
) -> ShownRow:
    label, teacher, student = (
        task.row_text(column[place], rows.classes.names)
        for column in (table.labels, table.teacher, table.student)
    )
    row = int(table.ids[place])
    sure = None if choice.confidence is None else float(choice.confidence[place])
    return ShownRow(str(row), rows.describe(row), label, teacher, student, sure, choice.subject)


def _make_media(spec: InputSpec, views: Views, value: Any, rows: Structure) -> dict[str, str]:
    """Make what is shown of one row, by its stored value and as it was decoded, [1, *].

    It is text where that is stored; else a picture, with the sound that it is of, or lines.
    """
    text = _text_of(value)
    if text is not None:
        return {"text": text[:_LONGEST]}
    kind = kind_named(spec.kind)
    plain = views.plain(narrow(rows, 0, 1))
    drawn = kind.draw(spec, rows, {"value": plain})
    if isinstance(drawn[0], str):
        return {"text": "\n".join(map(str, drawn))[:_LONGEST]}
    found = {"picture": _png(drawn[0][0])}
    wave = kind.playable_file(spec, rows)
    return found if wave is None else found | {"sound": base64.b64encode(wave).decode()}


def _text_of(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    texts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(t, str) for t in texts):
        return "\n".join(texts)
    return None


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
