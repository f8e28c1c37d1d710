"""Labels as estimators of scikit-learn are given them, some of which mark a row without one."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.utils import assert_all_finite, check_array  # type: ignore[import-untyped]
from sklearn.utils.validation import (  # type: ignore[import-untyped]
    check_consistent_length,
    column_or_1d,
)

Array: TypeAlias = npt.NDArray[Any]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_NO_LABELS = "{} requires y to be passed, but the target y is None"


def checked_labels(estimator: Any, inputs: Any, y: Any) -> Array:
    """Give labels as an array [rows]; raises ValueError where they are not as many as rows."""
    if y is None:
        raise ValueError(_NO_LABELS.format(type(estimator).__name__))
    y = column_or_1d(y, warn=True)
    if y.dtype.kind == "f":
        assert_all_finite(y, allow_nan=True, input_name="y")
    check_consistent_length(inputs, y)
    return np.asarray(y)


def checked_numbers(estimator: Any, inputs: Any, y: Any) -> Array:
    """Give targets as float64, [rows] or [rows, targets]; raises ValueError where they are none."""
    if y is None:
        raise ValueError(_NO_LABELS.format(type(estimator).__name__))
    y = check_array(
        y, dtype=np.float64, ensure_2d=False, ensure_all_finite="allow-nan", input_name="y"
    )
    check_consistent_length(inputs, y)
    numbers = np.asarray(y)
    return numbers[:, 0] if numbers.ndim == 2 and numbers.shape[1] == 1 else numbers


def unlabeled_rows(y: Array) -> BoolArray:
    """Tell which labels mark a row without one, bool [rows]."""
    missing = y != y if y.dtype.kind != "O" else np.array([v is None or v != v for v in y], bool)
    labels = y[~missing]
    if labels.dtype.kind in "iuf":
        minus_one = labels == -1
        others = np.unique(labels[~minus_one])
        is_mark = len(others) != 1 and not (others < 0).any()
    else:
        minus_one = np.array([str(label) in ("-1", "-1.0") for label in labels], bool)
        others = np.unique([str(label) for label in labels[~minus_one]])
        is_mark = not any(name.lstrip("-").isdecimal() for name in others)
    found = np.array(missing, bool)
    if is_mark:
        found[~missing] = minus_one
    return found


def plain_labels(labels: Array) -> Array:
    """Give labels of mixed Python types the type that they have without the marks."""
    if labels.dtype.kind != "O":
        return labels
    return np.array(labels.tolist(), dtype=object) if _has_text(labels) else np.array(list(labels))


def _has_text(labels: Array) -> bool:
    return any(isinstance(label, str) for label in labels)
