"""Which columns of a file `datasets` has types for; it refuses a whole file for one of another."""

from __future__ import annotations

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema


def known_features(schema: pa.Schema) -> datasets.Features:
    """Give the features of a file's columns, without those that `datasets` has no type for.

    Maps are such a type. What is left out is in `unknown_columns`.
    """
    plain = plain_schema(schema)
    unknown = unknown_columns(plain)
    if unknown:  # what the metadata says is of a set that `datasets` wrote, which has none
        plain = pa.schema([field for field in plain if field.name not in unknown])
    return datasets.Features.from_arrow_schema(plain)


def unknown_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Give the columns of types that `datasets` has no equivalent of."""
    if _is_known(schema):
        return {}
    return {field.name: field.type for field in schema if not _is_known(pa.schema([field]))}


def _is_known(schema: pa.Schema) -> bool:
    try:
        datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, pa.ArrowException):
        return False
    return True
