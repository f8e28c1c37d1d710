"""The columns that several files of one set have in common.

found = common({"a.parquet": features_of_a, "b.parquet": features_of_b}, "data.test (…)")
found.features  # what every file has, in types that hold what all of them hold
found.lacking["c"]  # 'b.parquet', which has no such column
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.errors import DataError


@dataclass(frozen=True)
class Columns:
    """The columns of all files, and of every other column a file that lacks it."""

    features: Any
    lacking: dict[str, str] = field(default_factory=dict)
    differ: bool = False
    """Whether the files have not all the same columns, types and order."""

    def require(self, names: Iterable[str], where: str) -> None:
        """Raise DataError for a column that is needed and that some file lacks."""
        for name in names:
            if name in self.lacking:
                raise DataError(
                    f"{where}: the column {name!r} is needed, and {self.lacking[name]} has none of "
                    "that name, while other files have; add it, or leave the file out of data_files"
                )


def common(files: Mapping[str, Any], name: str) -> Columns:
    """Find the columns that all files have, given the `datasets` features of each.

    Integers and floats of several widths become the widest, and a column of nulls alone is of the
    type that it has elsewhere. Raises DataError for types that have nothing in common.
    """
    (first, features), *others = files.items()
    found: dict[str, Any] = dict(features)
    origin = dict.fromkeys(found, first)
    lacking: dict[str, str] = {}
    differ = False
    for file, more in others:
        differ = differ or dict(more) != dict(features) or list(more) != list(features)
        for column in [column for column in found if column not in more]:
            lacking[column] = file
            del found[column]
        for column in more:
            if column in found:
                both = (found[column], more[column])
                found[column] = _joined(*both, column, (origin[column], file), name)
            else:
                lacking.setdefault(column, first)
    return Columns(datasets.Features(found), lacking, differ)


def wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None where there is none but text."""
    if a == b:
        return a
    try:
        both = pa.unify_schemas(
            [pa.schema([("column", kind)]) for kind in (a, b)], promote_options="permissive"
        )
    except pa.ArrowException:
        return None
    return both.field("column").type


def _joined(a: Any, b: Any, column: str, files: tuple[str, str], name: str) -> Any:
    """A feature that holds what two files hold; a class, image or sound stays what it is."""
    if a == b:
        return a
    kinds = [datasets.Features({column: one}).arrow_schema.field(column).type for one in (a, b)]
    classes = [one for one in (a, b) if isinstance(one, datasets.ClassLabel)]
    kind = wider(*kinds)
    if kind is not None and not classes:
        for feature, own in zip((a, b), kinds, strict=True):
            if own == kind:
                return feature
        return datasets.Features.from_arrow_schema(pa.schema([(column, kind)]))[column]
    if len(classes) == 1 and kind == pa.int64():
        return classes[0]
    raise DataError(
        f"{name}: the column {column!r} is {_called(a, kinds[0])} in {files[0]} and "
        f"{_called(b, kinds[1])} in {files[1]}, which do not go together; write all files with the "
        "same types"
    )


def _called(feature: Any, kind: pa.DataType) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"of the classes {', '.join(feature.names[:6])}"
    return str(kind)
