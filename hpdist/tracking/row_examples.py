"""Rows of a measured set that are worth a look, as a run folder keeps and a report shows them.

`examples/rows.json` holds groups of rows and, by a row's id, its picture, its sound or its text. A
table's rows are text too.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FILE = "examples/rows.json"
_NARROW = 4  # rows of a group that fit beside another group
_KINDS = {"picture": "image/png", "sound": "audio/wav"}


@dataclass(frozen=True)
class ShownRow:
    """A row in a group."""

    id: str
    where: str
    """File and row."""
    label: str
    teacher: str
    student: str
    confidence: float | None = None
    """The probability that is shown, and by which right and wrong have a meaning."""
    subject: str = ""
    """What that is the probability of, where it is not the teacher's prediction."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that have something in common."""

    title: str
    rows: Sequence[ShownRow]


@dataclass(frozen=True)
class RowExamples:
    """What `examples/rows.json` holds."""

    name: str
    """The set, such as test."""
    groups: Sequence[RowGroup]
    media: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By a row's id: picture and sound in base64, or text."""

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        return asdict(self)

    @classmethod
    def of(cls, content: bytes) -> RowExamples:
        """Read it. Raises ValueError, TypeError or KeyError where it is something else."""
        values = json.loads(content.decode("utf-8", "replace"))
        groups = [
            RowGroup(str(group["title"]), [_row(row) for row in group["rows"]])
            for group in values["groups"]
        ]
        media = {str(key): _media(value) for key, value in values["media"].items()}
        return cls(str(values["name"]), groups, media)


def _row(values: Mapping[str, Any]) -> ShownRow:
    texts = {key: str(values[key]) for key in ("id", "where", "label", "teacher", "student")}
    sure, subject = values["confidence"], str(values.get("subject", ""))
    return ShownRow(**texts, confidence=None if sure is None else float(sure), subject=subject)


def _media(values: Mapping[str, Any]) -> dict[str, str]:
    """Take what can be shown; a picture or a sound must be base64."""
    found = {key: str(values[key]) for key in ("text", *_KINDS) if key in values}
    for key in _KINDS:
        base64.b64decode(found.get(key, ""), validate=True)
    return found


def row_examples_html(examples: RowExamples, run: str) -> str:
    """Give the part of a report that shows them."""
    parts = [f"<h2>Rows of the {html.escape(examples.name)} set: {html.escape(run)}</h2>"]
    for group in examples.groups:
        figures = "".join(_figure(row, examples.media.get(row.id, {})) for row in group.rows)
        title = f"<h3>{html.escape(group.title)}</h3>"
        width = ' class="whole"' if len(group.rows) > _NARROW else ""
        parts.append(f'<section{width}>{title}<div class="rows">{figures}</div></section>')
    return f'{parts[0]}<div class="groups">{"".join(parts[1:])}</div>'


def _figure(row: ShownRow, media: Mapping[str, str]) -> str:
    shown = []
    if "picture" in media:
        shown.append(f'<img alt="" src="data:image/png;base64,{media["picture"]}">')
    if "sound" in media:
        source = f"data:audio/wav;base64,{media['sound']}"
        shown.append(f'<audio controls preload="none" src="{source}"></audio>')
    if "text" in media:
        shown.append(f"<pre>{html.escape(media['text'])}</pre>")
    judged = html.escape(row.teacher)
    if row.confidence is not None:
        right = "right" if row.teacher == row.label else "wrong"
        share = f"{100 * row.confidence:.1f} %"
        share = f"({html.escape(row.subject)}: {share})" if row.subject else share
        judged = f'<span class="{right}">{judged}</span> {share}'
    lines = [f"{html.escape(row.label)} → {judged}"]
    if row.student != row.teacher:
        lines.append(f"student: {html.escape(row.student)}")
    caption = "<br>".join(lines)
    return (
        f'<figure title="{html.escape(row.where)}">{"".join(shown)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )
