"""Arrow types that hold the same values in another layout, and the plain ones that all code reads.

Writers such as Polars choose string and binary views, list views and dictionaries by themselves.
Arrow cannot take rows from all of those, nor does `datasets` know each of them.
"""

from __future__ import annotations

import pyarrow as pa  # type: ignore[import-untyped]


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Give the type that values are read in: the type itself, unless it is only another layout."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        canonical = kind.extension_name.startswith("arrow.")  # others are those of `datasets`
        return plain_type(kind.storage_type) if canonical else kind
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return kind


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Give the same columns in plain types; what the schema's metadata says is kept."""
    return pa.schema([_plain_field(field) for field in schema], schema.metadata)


def plain_table(table: pa.Table) -> pa.Table:
    """Give the same rows in plain types; the table itself where it has no others."""
    schema = plain_schema(table.schema)
    return table if schema.types == table.schema.types else table.cast(schema)


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give the same values in a plain type; the column itself where it has one."""
    kind = plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))
