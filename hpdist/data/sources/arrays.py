"""Arrays of inputs and labels as a table: what `Trainer(labeled=(X, y))` makes of them."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch

from hpdist.errors import ConfigError, describe

INPUT, LABEL = "input", "label"
"""The names of the columns."""


def is_array(value: Any) -> bool:
    """Tell whether a value is an array, a tensor, or a frame or series of pandas."""
    return isinstance(value, (np.ndarray, torch.Tensor)) or (
        type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy")
    )


def array_table(name: str, inputs: Any, labels: Any = None) -> datasets.Dataset:
    """Make a table of inputs, and of labels where there are any.

    Args:
        name: The set, for messages.
        inputs: Vectors [rows, features]; images [rows, height, width] or [rows, height, width,
            channels], uint8; texts or sounds need a table of their own. Of a DataFrame each column
            stays one.
        labels: [rows], or [rows, targets].

    Raises ConfigError where they are not as many, or no table can be made of them.
    """
    if labels is not None and len(inputs) != len(labels):
        raise ConfigError(
            f"{name}: X has {len(inputs)} rows and y has {len(labels)}; give as many of each"
        )
    try:
        if hasattr(inputs, "columns"):
            frame = inputs.rename(columns=str)
            table = datasets.Dataset.from_pandas(frame, preserve_index=False)
        else:
            array = _numpy(inputs)
            types = datasets.Features({INPUT: _feature(array)})
            table = datasets.Dataset.from_dict({INPUT: array}, features=types)
        if labels is None:
            return table
        return table.add_column(LABEL, _listed(labels))
    except Exception as error:  # pyarrow raises many types
        raise ConfigError(f"{name}: cannot be made a table: {describe(error)}") from error


def _numpy(value: Any) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _listed(labels: Any) -> list[Any]:
    """Labels as Python values; numbers of one target in a column are numbers."""
    array = _numpy(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    found: list[Any] = array.tolist()
    return found


def _feature(array: np.ndarray[Any, Any]) -> Any:
    """The type of a column of arrays."""
    dtype, shape = str(array.dtype), array.shape[1:]
    if len(shape) == 1:
        return datasets.List(datasets.Value(dtype), length=shape[0])
    if len(shape) in (2, 3):
        return (datasets.Array2D if len(shape) == 2 else datasets.Array3D)(shape, dtype)
    raise ValueError(
        f"inputs are vectors or images, and an array {list(array.shape)} holds neither"
    )
