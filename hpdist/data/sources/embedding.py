"""Put the files that rows name into the rows, wherever in a table images and sound are."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets.features.features import _visit, require_storage_embed
from datasets.table import embed_array_storage

from hpdist.data.files.named_files import NamedFile, PathRule, named


def embedded(table: pa.Table, features: Any, rule: PathRule) -> pa.Table:
    """Return the table with every file that its rows name in the row itself.

    `features` are those of the table. `datasets` would open whatever a row names; here the rule
    holds. Raises what `NamedFile.read` raises.
    """

    def swapped(feature: Any) -> Any:
        # Not None, for which `datasets` would take the feature as it was, with all within it.
        return _Embedding(rule) if hasattr(feature, "embed_storage") else feature

    columns = [
        embed_array_storage(table[name], _visit(feature, swapped))
        if require_storage_embed(feature)
        else table[name]
        for name, feature in features.items()
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


class _Embedding:
    """Stands for `Image` or `Audio` where `datasets` embeds their storage."""

    def __init__(self, rule: PathRule) -> None:
        self._rule = rule

    def embed_storage(self, storage: pa.StructArray, *_: Any, **__: Any) -> pa.StructArray:
        """Return {bytes, path} of each row with the bytes, and of the path its last part."""
        rows = storage.to_pylist()
        values = named(rows, self._rule)
        held = [
            value.read() if isinstance(value, NamedFile) else value and value["bytes"]
            for value in values
        ]
        paths = [row and row["path"] and os.path.basename(row["path"]) for row in rows]
        arrays = [pa.array(held, pa.binary()), pa.array(paths, pa.string())]
        return pa.StructArray.from_arrays(arrays, ["bytes", "path"], mask=storage.is_null())
