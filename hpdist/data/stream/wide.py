"""Arrow types whose offsets have 64 bits, for tables whose values take more than 32 can count."""

from __future__ import annotations

import pyarrow as pa  # type: ignore[import-untyped]

MOST_IN_32_BITS = 1 << 30  # bytes; beyond, a column's offsets might not fit


def wide_schema(schema: pa.Schema) -> pa.Schema:
    """Give a table's columns with 64-bit offsets."""
    return pa.schema([field.with_type(_wide(field.type)) for field in schema])


def widened(table: pa.Table) -> pa.Table:
    """Cast a table that is so large that it needs 64-bit offsets; return any other as it is."""
    if table.get_total_buffer_size() <= MOST_IN_32_BITS or table.nbytes <= MOST_IN_32_BITS:
        return table  # of slices, the buffers may be those of far more rows
    return table.cast(wide_schema(table.schema))


def joined(tables: list[pa.Table]) -> pa.Table:
    """Put tables one behind the other, without a copy where none of them is wide."""
    try:
        return pa.concat_tables(tables)  # to compare schemas here would take longer
    except pa.ArrowInvalid:  # they differ
        return pa.concat_tables([table.cast(wide_schema(table.schema)) for table in tables])


def _wide(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_wide(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.large_list(kind.value_field.with_type(_wide(kind.value_type)))
    return kind
