"""The mode of a run's pictures: chosen once, by settings and rows, and held to by every set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hpdist.data.decode.image import CHANNELS
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.kinds.base import Context, Facts, TableOfRows
from hpdist.data.kinds.pictures import (
    declared_mode,
    look_at_labeled,
    look_at_others,
    mode_line,
    shown_mode,
)
from hpdist.errors import CheckpointError
from hpdist.messages.human import shown_numbers
from hpdist.messages.progress import working

_MODES = {channels: mode for mode, channels in CHANNELS.items()}
_LABELED = "data.labeled"


@working("looking at the labelled pictures")
def choose_mode(
    channels: int | None, rows: TableOfRows, spec: ImageSpec, context: Context
) -> Facts:
    """Choose the mode of encoded pictures by what the labelled set and `views.channels` say.

    Raises DataError, or CheckpointError where the setting wants another mode than the run that
    goes on began with.
    """
    if context.resumed:
        mode = str(recorded_mode(context.recorded) or _mode_of_first(rows, spec))
        if channels not in (None, CHANNELS[mode]):
            raise CheckpointError(
                f"views.channels: {channels}, but the run that goes on began with pictures of "
                f"{shown_mode(mode)}; choose another run.name, or make the settings agree"
            )
        return Facts({"mode": mode})
    if channels is not None:
        mode = _MODES[channels]
        line = f"pictures: {shown_mode(mode)}, by views.channels"
        return Facts({"mode": mode}, (f"{line}; {_converted(mode)}",))
    declared = declared_mode(rows)
    if declared is not None:
        line = f"pictures: {shown_mode(declared)}, as the column of data.labeled is cast"
        return Facts({"mode": declared}, (f"{line}; {_converted(declared)}",))
    counts = look_at_labeled(rows)
    mode = counts.mode if counts.pictures else str(spec.mode)
    return Facts({"mode": mode}, (mode_line(mode, counts),), open=mode == "L")


def reconsider(facts: Facts, sets: Mapping[str, Any]) -> Facts:
    """Look for colour in the other sets, where the labelled pictures are all grey.

    Also names the sets that `datasets` is told to decode in another mode than the run does. Raises
    DataError when a set's files cannot be read.
    """
    others = {name: rows for name, rows in sets.items() if rows is not None and name != _LABELED}
    if facts.open:
        for name, counts in look_at_others(others).items():
            if counts.colour:
                line = (
                    f"{mode_line('RGB', counts, f'pictures of {name}')}; the labelled ones are grey"
                )
                facts = replace(facts, values={"mode": "RGB"}, lines=(line,))
                break
    mode = facts.values["mode"]
    casts = {name: declared_mode(rows) for name, rows in others.items()}
    notes = [
        f"note: {name}: its column is cast to {own}, and decoded in {mode} as data.labeled is"
        for name, own in casts.items()
        if own not in (None, mode)
    ]
    return replace(facts, lines=(*facts.lines, *notes))


def for_channels(views: Any, given: Any, channels: int) -> tuple[Any, str | None]:
    """Make mean and deviation that a model gave for three channels fit one, by their mean; say so.

    `given` are the views' settings before that: what they set stays.
    """
    changed = {
        key: [sum(values) / len(values)]
        for key in ("mean", "std")
        if getattr(given, key) is None and len(values := getattr(views, key) or []) > channels == 1
    }
    if not changed:
        return views, None
    settings = ", ".join(f"views.{key} {shown_numbers(value)}" for key, value in changed.items())
    return views.model_copy(update=changed), f"for one channel their mean: {settings}"


def recorded_mode(recorded: Mapping[str, Any]) -> Any:
    """Give the mode that a run's record holds; None where it holds none."""
    return recorded.get("mode")


def _converted(mode: str) -> str:
    return "colour becomes grey" if mode == "L" else "every picture becomes so"


def _mode_of_first(rows: TableOfRows, spec: ImageSpec) -> str:
    """The mode of the split's first picture, which runs without a record went by."""
    try:
        return str(ImageSpec.of(rows.read_split([0])[0], limits=spec.limits).mode)
    except Exception:  # image libraries raise nearly everything on a damaged file
        return str(spec.mode)
