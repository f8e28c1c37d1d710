"""Finding the column of an input by the types of a table's columns, and saying what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets

from hpdist.data.decode.categories import held, is_category, is_number
from hpdist.errors import DataError

_BYTES = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view")
_LISTS = (datasets.List, datasets.LargeList)
_ARRAYS = (datasets.Array2D, datasets.Array3D)


def find_column(
    features: Any,
    column: str | None,
    setting: str,
    exclude: str | None,
    *,
    usual: Callable[[Any], bool],
    fits: Callable[[Any], bool],
    what: str,
    taker: str,
    wanted: str | None = None,
    hint: Callable[[str, Any], str] = lambda column, feature: "",
) -> str:
    """Find one column: as named, if it `fits`, else the only one that is `usual`.

    `what` the column holds and who takes it, `wanted` in place of "not `what`", and a hint for a
    column and its type are for messages. Raises DataError.
    """
    others = {key: feature for key, feature in features.items() if key != exclude}
    if column is None:
        found: list[str] = [key for key, feature in others.items() if usual(feature)]
        if len(found) != 1:
            holds = ", ".join(f"{key} ({held(feature)})" for key, feature in others.items())
            count = f"{len(found)} columns hold" if found else "no column holds"
            raise DataError(
                f"{setting}: name the input column, {count} {what}, which {taker} takes; the "
                f"columns are {holds}"
            )
        return found[0]
    feature = features[known_column(features, column, setting)]
    if fits(feature):
        return column
    inputs = ", ".join(key for key, feature in others.items() if fits(feature)) or "none"
    raise DataError(
        f"{setting}: column {column!r} holds {feature}, {wanted or f'not {what}'}"
        f"{hint(column, feature)}; candidates: {inputs} (of the columns {', '.join(features)})"
    )


def known_column(features: Any, column: str, setting: str) -> str:
    """Give a column's name back; raises DataError where there is none of that name."""
    if column not in features:
        raise DataError(
            f"{setting}: there is no column {column!r}; there are {', '.join(features)}"
        )
    return column


def check_list(features: Any, columns: Sequence[str], setting: str, exclude: str | None) -> None:
    """Raise DataError unless each column of a list can be one of a table's.

    Each must hold numbers, booleans or what may be categories, and none be the label `exclude`.
    """
    for name in columns:
        feature = features[known_column(features, name, setting)]
        if name == exclude:
            raise DataError(f"{setting}: column {name!r} is the label; leave it out")
        if columns.count(name) > 1:
            raise DataError(f"{setting}: column {name!r} is there twice; name each once")
        if not is_number(feature) and not is_category(feature):
            raise DataError(
                f"{setting}: column {name!r} holds {feature}, and a list of columns must hold "
                "numbers, booleans or categories, which are texts or a ClassLabel; write it as one "
                "of these, or leave it out"
            )


def is_text(feature: Any) -> bool:
    """Tell whether a column holds text; a ClassLabel, whose names are texts, does not."""
    return getattr(feature, "dtype", "") in _TEXT


def is_encoded_image(feature: Any) -> bool:
    """Image, or what Parquet files hold of one without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in _BYTES


def is_encoded_audio(feature: Any) -> bool:
    """Audio, or what Parquet files hold of it without its type: {bytes, path} or plain bytes."""
    if isinstance(feature, datasets.Audio):
        return True
    return is_encoded_image(feature) and not isinstance(feature, datasets.Image)


def is_bytes(feature: Any) -> bool:
    """Tell whether a column holds encoded values without a type that says of what kind."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return getattr(feature, "dtype", "") in _BYTES or has_equal_bytes(feature)


def has_equal_bytes(feature: Any) -> bool:
    """Tell whether a column holds as many bytes in every row."""
    return bool(getattr(feature, "dtype", "").startswith("fixed_size_"))


def is_array(feature: Any) -> bool:
    """Tell whether a column holds numbers in two or three dimensions."""
    if isinstance(feature, _ARRAYS):
        return True
    inner = feature.feature if isinstance(feature, _LISTS) else None
    return isinstance(inner, _LISTS) and (is_vector(inner) or is_array(inner))


def is_vector(feature: Any) -> bool:
    """Tell whether a column holds lists of numbers."""
    return isinstance(feature, _LISTS) and is_number(feature.feature)


def is_list_or_array(feature: Any) -> bool:
    """Tell whether a column holds lists or arrays, of whatever there may be in them."""
    return isinstance(feature, (*_LISTS, *_ARRAYS))
