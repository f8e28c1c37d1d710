"""Which mode a run's pictures are decoded in: grey, colour, or colour with transparency.

Pictures of one set come in many modes: a scan in grey among photographs, GIFs with palettes, PNGs
with transparency. A model takes one number of channels, so that one decision holds for all sets:

1. `views.channels`, where it is set;
2. the mode that `datasets` is told to decode the labelled pictures in (`Image(mode="RGB")`);
3. what the labelled pictures in use are, by their headers: RGBA where each has transparency, L
   where none has colour, RGB otherwise. Where they are all grey, some pictures of the other sets
   are looked at too, and a single one in colour makes it RGB.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import datasets
import numpy as np
from PIL import Image

from hpdist.data.decode.image import CHANNELS, check_icon, mode_of
from hpdist.data.files.named_files import USUAL_LIMITS, NamedFile
from hpdist.data.kinds.base import TableOfRows
from hpdist.errors import DataError

_MOST = 20_000  # labelled pictures whose headers are read: some seconds
_MOST_REMOTE = 64  # of those that each cost a request
_MOST_OTHERS = 64  # pictures of another set
_AT_ONCE = 256  # rows
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_PALETTES = ("RGB", "BGR", "RGBX", "BGRX", "RGBA", "BGRA")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass
class PictureCounts:
    """Pictures that were looked at, and what they are."""

    pictures: int = 0
    colour: int = 0
    transparent: int = 0
    rows: int = 0
    """Rows of the set, of which these are some or all."""

    @property
    def mode(self) -> str:
        """What they are decoded in, if they decide."""
        if self.pictures and self.transparent == self.pictures:
            return "RGBA"
        return "RGB" if self.colour else "L"

    def add(self, value: Any) -> None:
        """Look at a stored picture; one that cannot be opened tells nothing, and is named later."""
        try:
            with _source(value) as source:
                check_icon(source, USUAL_LIMITS)  # which opening would decode
                with Image.open(source) as image:
                    colour, transparent = has_colour(image), has_transparency(image)
        except Exception:  # image libraries raise nearly everything on a damaged file
            return
        self.pictures += 1
        self.colour += colour
        self.transparent += transparent


def has_colour(image: Image.Image) -> bool:
    """Tell from an image's header whether it may hold colour; of a palette, from its entries."""
    if image.mode not in ("P", "PA") or image.palette is None:
        return image.mode not in _GREY
    layout, data = image.palette.getdata()  # as the header has it: nothing is decoded
    if layout not in _PALETTES:
        return True
    entries = np.frombuffer(data, np.uint8).reshape(-1, len(layout))[:, :3]
    return bool((entries != entries[:, :1]).any())


def has_transparency(image: Image.Image) -> bool:
    """Tell from an image's header whether pixels may be transparent."""
    return image.mode in _TRANSPARENT or "transparency" in image.info


def declared_mode(rows: Any) -> str | None:
    """Give the mode that `datasets` is told to decode a set's pictures in: L, RGB or RGBA.

    None where it is told none. Raises DataError for a mode that no picture can be decoded in.
    """
    features = getattr(getattr(rows, "dataset", None), "features", None) or {}
    feature = features.get(rows.column)
    if not isinstance(feature, datasets.Image) or feature.mode is None:
        return None
    try:
        return mode_of(Image.new(feature.mode, (1, 1)))
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{rows.name}: column {rows.column!r} is to be decoded in mode {feature.mode!r}, which "
            "views cannot take; cast it to datasets.Image(mode='L'), 'RGB' or 'RGBA'"
        ) from error


def look_at_labeled(rows: TableOfRows) -> PictureCounts:
    """Look at the labelled pictures in use, or at many of them, spread evenly.

    Raises DataError when the set's files cannot be read.
    """
    counts = PictureCounts(rows=len(rows))
    first = rows.read(np.zeros(1, np.int64))
    count = min(len(rows), _MOST_REMOTE if _far(first[0]) else _MOST)
    places = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    for start in range(0, count, _AT_ONCE):
        for value in rows.read(places[start : start + _AT_ONCE]):
            counts.add(value)
    return counts


def look_at_others(sets: Mapping[str, Any]) -> dict[str, PictureCounts]:
    """Look at a few pictures of sets that do not decide by themselves, by the sets' names.

    Raises DataError when a set's files cannot be read.
    """
    found = {}
    for name, rows in sets.items():
        counts = found[name] = PictureCounts()
        for value in _some(rows):
            counts.rows += 1
            counts.add(value)
    return found


def _some(rows: Any) -> Iterable[Any]:
    """The first rows of an epoch, each once."""
    one: dict[str, Any] = {"kind": "parquet", "lanes": 1, "groups_per_window": 1}
    parts = getattr(rows, "parts", None)  # of several sets that are mixed
    order = one if parts is None else {"parts": [one] * len(parts)}
    reader = rows.reader(0, _MOST_OTHERS, order=order)
    try:
        read = reader.read(0, _MOST_OTHERS, 0, _MOST_OTHERS)
        values = rows.values(read).values
        return [values[line] for line in np.unique(read.ids, return_index=True)[1]]
    finally:
        reader.close()


def mode_line(mode: str, counts: PictureCounts, whose: str = "labelled pictures") -> str:
    """Say what a mode was chosen by, in one line."""
    some = (
        f"{counts.pictures}"
        if counts.pictures == counts.rows
        else f"{counts.pictures} of {counts.rows}"
    )
    grey = counts.pictures - counts.colour
    if counts.transparent in (0, counts.pictures) and 0 in (grey, counts.colour):
        kind = {"L": "grey", "RGB": "in colour", "RGBA": "with transparency"}[mode]
        return f"pictures: {shown_mode(mode)}: the {some} {whose} that were looked at are {kind}"
    shares = [
        f"{count} {kind}" for count, kind in ((counts.colour, "in colour"), (grey, "grey")) if count
    ]
    if counts.transparent:
        shares.append(f"{counts.transparent} with transparency")
    return (
        f"pictures: {shown_mode(mode)}: of the {some} {whose} that were looked at "
        f"{', '.join(shares)}; every picture becomes so (views.channels chooses otherwise)"
    )


def shown_mode(mode: str) -> str:
    """A mode as a person knows it, for messages."""
    channels = CHANNELS[mode]
    return f"{channels} channel{'s' * (channels > 1)} ({mode})"


def _far(value: Any) -> bool:
    """Whether a picture lies in a file of its own on another machine."""
    return isinstance(value, NamedFile) and value.is_remote


def _source(value: Any) -> IO[bytes]:
    """The bytes of a stored picture, or its file, of which opening reads the header alone."""
    if isinstance(value, NamedFile):
        return io.BytesIO(value.read()) if value.is_remote else value.open()
    return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)
