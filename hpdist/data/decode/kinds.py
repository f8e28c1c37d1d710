"""Which kind of input a set holds, and in which columns, where the config does not say.

    found = find_input(table, "label", "data.labeled", takes={"table"})
    found.kind, found.columns  # "table", ("age", "city")

A column of images or sound is the input wherever there is one. Otherwise it is what both the
columns and the model allow: one column of text, or all of numbers and categories, as a table. Where
that leaves several, nothing is guessed.
"""

from __future__ import annotations

import io
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
from PIL import Image

from hpdist.data.decode.arrow_types import plain_column
from hpdist.data.decode.categories import MOST, is_category, is_number
from hpdist.data.decode.encoded import stored_bytes
from hpdist.data.decode.stored_values import Column, stored_values
from hpdist.data.files.named_files import USUAL_LIMITS
from hpdist.errors import DataError

Kind: TypeAlias = Literal["image", "text", "audio", "table"]
KINDS: tuple[Kind, ...] = ("image", "text", "audio", "table")
_LIKE_IDS = 20  # rows from which on a column that never repeats itself is taken for an id


@dataclass(frozen=True)
class FoundInput:
    """What the model is to see."""

    kind: Kind
    column: Column
    lines: tuple[str, ...] = ()
    """What was decided, for a person."""


def find_input(table: Any, label: str, where: str, takes: Set[str]) -> FoundInput:
    """Find what a labelled set holds, given its column of labels and what the model takes.

    Raises DataError that lists the candidates where several columns fit, or none.
    """
    kinds = {
        name: _kind_of(table, name, feature)
        for name, feature in table.features.items()
        if name != label
    }
    media = [name for name, kind in kinds.items() if kind in ("image", "audio")]
    arrays = [name for name, kind in kinds.items() if kind in ("array", "vector")]
    texts = [name for name, kind in kinds.items() if kind == "text"]
    numbers = [name for name, kind in kinds.items() if kind in ("number", "class")]
    if len(media) == 1:
        (column,) = media
        return _one(column, "audio" if kinds[column] == "audio" else "image", kinds)
    if media:
        raise _ambiguous(where, {name: kinds[name] for name in media})
    if arrays:
        if len(arrays) > 1 or texts or numbers:
            raise _ambiguous(where, kinds)
        return _one(arrays[0], "image" if kinds[arrays[0]] == "array" else "table", kinds)
    if not texts and not numbers:
        raise DataError(
            f"{where}.input: no column can be what the model sees: {_listed(kinds)}; besides the "
            f"label, {label!r}, there must be images, sound, text or numbers"
        )
    if not texts or ("table" in takes and "text" not in takes):
        return _table(table, [name for name in kinds if name in {*texts, *numbers}], kinds, where)
    if len(texts) == 1 and (not numbers or "table" not in takes):
        return _one(texts[0], "text", kinds)
    raise _ambiguous(where, {name: kinds[name] for name in [*texts, *numbers]})


def kind_of_input(table: Any, column: Column | list[str]) -> Kind | None:
    """Tell what the columns hold that a config names; None where that is no kind of input."""
    if not isinstance(column, str):
        return "table"
    if column not in table.features:
        return None
    found = _kind_of(table, column, table.features[column])
    by_kind: dict[str, Kind] = {"array": "image", "vector": "table"}
    by_kind |= {kind: kind for kind in KINDS}
    return by_kind.get(found)


def _one(column: str, kind: Kind, kinds: dict[str, str]) -> FoundInput:
    line = f"input: {kind}, the column {column!r} ({_HELD[kinds[column]]}) of data.labeled"
    return FoundInput(kind, column, (line,))


def _table(table: Any, columns: list[str], kinds: dict[str, str], where: str) -> FoundInput:
    """Take all columns of numbers and categories, but for those that only tell rows apart."""
    ids = [name for name in columns if _is_id(table, name)]
    kept = tuple(name for name in columns if name not in ids)
    others = [name for name in kinds if name not in columns]
    many = [name for name in kept if kinds[name] == "text" and _count(table, name) > MOST]
    if many:
        rest = ", ".join(name for name in kept if name not in many)
        raise DataError(
            f"{where}.input: column {many[0]!r} has {_count(table, many[0])} different texts, more "
            f"than the {MOST} that become categories; name the columns to use, such as "
            f"{where}.input: [{rest}]; for a model of that text name it alone"
        )
    if not kept:
        raise DataError(
            f"{where}.input: every column tells rows apart, as an id does ({', '.join(ids)}); name "
            f"the columns that the model is to see, as a list{_text_hint(ids, kinds)}"
        )
    said = [f"input: table, the columns {', '.join(kept)} of data.labeled"]
    if ids:
        said.append(
            f"note: {where}: left out of the input, since no two rows have the same there, as of "
            f"an id: {', '.join(ids)}; {where}.input names the columns to use"
        )
    if others:
        said.append(
            f"note: {where}: left out of the input, since they hold neither numbers nor "
            f"categories: {', '.join(others)}"
        )
    return FoundInput("table", kept, tuple(said))


def _text_hint(columns: list[str], kinds: dict[str, str]) -> str:
    """Say what takes text, where there is a column of it."""
    texts = [name for name in columns if kinds[name] == "text"]
    return f"; a model of text, such as hf:…, takes {texts[0]!r} as text" if texts else ""


def _is_id(table: Any, name: str) -> bool:
    """Whether no two rows have the same text, or integers count the rows one by one."""
    feature, rows = table.features[name], len(table)
    whole = getattr(feature, "dtype", "").startswith(("int", "uint"))
    text = is_category(feature) and not isinstance(feature, datasets.ClassLabel)
    if rows < _LIKE_IDS or not (whole or text) or _count(table, name) < rows:
        return False
    if text:
        return True
    ends = pc.min_max(_stored(table, name)).as_py()
    return bool(ends["max"] - ends["min"] == rows - 1)


def _count(table: Any, name: str) -> int:
    """How many values a column has, without null."""
    return int(pc.count_distinct(_stored(table, name), mode="only_valid").as_py())


def _stored(table: Any, name: str) -> Any:
    return plain_column(table.select_columns([name]).with_format("arrow")[:].column(name))


_HELD = {
    "image": "images",
    "audio": "sound",
    "text": "text",
    "array": "arrays",
    "vector": "vectors",
    "number": "numbers",
    "class": "a ClassLabel",
}


def _kind_of(table: Any, name: str, feature: Any) -> str:
    """What a column holds: a key of `_HELD`, or `other`."""
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Audio):
        return "audio"
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return "array"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _kind_of_list(feature.feature)
    if is_number(feature):
        return "number"
    if is_category(feature):
        return "text"
    if _is_bytes(feature):
        return _kind_of_bytes(table, name)
    return "other"


def _kind_of_list(inner: Any) -> str:
    """Lists of numbers are vectors, and lists of these images."""
    if is_number(inner):
        return "vector"
    nested = isinstance(inner, (datasets.List, datasets.LargeList))
    return "array" if nested and _kind_of_list(inner.feature) != "other" else "other"


def _is_bytes(feature: Any) -> bool:
    """What Parquet files hold of images or sound without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    dtype = getattr(feature, "dtype", "")
    return dtype in ("binary", "large_binary", "binary_view") or dtype.startswith("fixed_size_")


def _kind_of_bytes(table: Any, name: str) -> str:
    """Tell bytes of sound from those of images by the first row; what is neither may be images."""
    first = table.select_columns([name]).with_format("arrow")[:1].column(name)
    try:
        data = stored_bytes(stored_values(first)[0], "bytes", USUAL_LIMITS)
    except (ValueError, OSError):  # whoever decodes the row says better what is wrong with it
        return "image"
    return "audio" if not _is_picture(data) and _is_sound(data) else "image"


def _is_picture(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # image libraries raise nearly everything on a damaged file
        return False


def _is_sound(data: bytes) -> bool:
    """Whether bytes begin as WAV, FLAC, Ogg or MP3 files do."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return True
    return data.startswith((b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"))


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(
        f"{name} ({_HELD.get(kind, 'of another kind')})" for name, kind in kinds.items()
    )


def _ambiguous(where: str, kinds: dict[str, str]) -> DataError:
    return DataError(
        f"{where}.input: several columns can be what the model sees; name one, or a list of those "
        f"of a table; candidates: {_listed(kinds)}"
    )
