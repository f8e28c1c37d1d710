"""Rows that Python code gives, as objects of `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from hpdist.errors import ConfigError

IN_MEMORY = "(given in Python)"
"""The path of a set that was given in Python."""
ROWS = (
    "a datasets.Dataset or IterableDataset, a pandas.DataFrame, a list of rows (dicts), a path, or "
    "settings such as {'path': 'parquet', 'data_files': 'rows.parquet'}; rows may come with "
    "settings, as (rows, {'input': 'image'})"
)
DICTS = (datasets.DatasetDict, datasets.IterableDatasetDict)


def table_of(name: str, value: Any) -> Any:
    """Convert rows into a `datasets` object. Raises ConfigError, which calls them `name`."""
    if isinstance(value, DICTS):
        if len(value) != 1:
            splits = ", ".join(map(str, value)) or "none"
            raise ConfigError(
                f"{name}: must be one split, but this {type(value).__name__} has several or none "
                f"({splits}); give one of them, such as {name}=data['train']"
            )
        return next(iter(value.values()))
    if isinstance(value, (datasets.Dataset, datasets.IterableDataset)):
        return value
    try:
        if type(value).__module__.partition(".")[0] == "pandas":
            return datasets.Dataset.from_pandas(value, preserve_index=False)
        if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            return datasets.Dataset.from_list(value)
    except Exception as error:  # pyarrow raises many types
        raise ConfigError(
            f"{name}: cannot be made a table: {type(error).__name__}: {error}"
        ) from error
    raise ConfigError(f"{name}: must be {ROWS}, not {kind_of_value(value)}")


def kind_of_value(value: Any) -> str:
    """Describe a given value for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value)
    if kind.__module__ == "builtins":
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {kind.__module__}.{kind.__name__}"
