"""Regression: a row has one or several numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpdist.errors import DataError
from hpdist.tasks.base import DIVERGENCE, PREDICTIONS, Task, TaskConfig
from hpdist.tasks.metrics import Meter, TorchMetrics
from hpdist.tasks.row_choices import IN_ALL, OutcomeTable, RowChoice

if TYPE_CHECKING:
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import BoolArray, Classes, StoredLabels
    from hpdist.data.sources.label_encoding import Encoding, RowNumbers
    from hpdist.data.structures import Arrays

Float64Array = npt.NDArray[np.float64]

_MOST_NUMBERS = 6
"""Numbers of a row that a report shows."""


class Regression(Task):
    """A row has one or several numbers: squared error; labels are fp32 [rows, targets].

    Labels and outputs are standardised: an output of 1 stands for `mean` + `std` in the
    targets' own units, which scores and predictions are in.

    Args:
        std: The standard deviation of each target; by default 1.
        mean: The mean of each target; by default 0.
    """

    name = "regression"
    abilities = frozenset({PREDICTIONS, DIVERGENCE})
    headline = "rmse"
    headline_title = "Root mean squared error"
    larger_is_better = False
    summarized = ("rmse", "mae", "r2")
    names_are = "targets"

    def __init__(
        self, std: tuple[float, ...] | None = None, mean: tuple[float, ...] | None = None
    ) -> None:
        self.std = std
        self.mean = mean

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Read the column as numbers, or lists of as many numbers."""
        from hpdist.data.sources.classes import Classes
        from hpdist.data.sources.labels import is_blank

        _check_numbers(stored)
        column = stored.column
        first = next((value for value in stored.values if not is_blank(value)), None)
        width = len(first) if isinstance(first, list) else 1
        if num_classes not in (None, width):
            raise DataError(
                f"{stored.where}.label: column {column!r} has {width} targets, but "
                f"model.num_classes is {num_classes}; make them equal"
            )
        names = [column] if width == 1 else [f"{column}[{number}]" for number in range(width)]
        return Numbers(Classes(tuple(names)))

    def recorded_encoding(
        self, classes: Classes, facts: Mapping[str, Any], state: Mapping[str, Array]
    ) -> Encoding | None:
        """Read numbers by the scale of the labelled rows."""
        if facts.get("class") != Numbers.__name__ or not state:
            return None
        return Numbers(classes, Scale(state["mean"], state["std"]))

    def fitted(self, encoding: Encoding) -> Regression:
        """Give the task in the units of the labels that were read."""
        state = encoding.state
        if not state:
            return self
        std, mean = (tuple(state[name].tolist()) for name in ("std", "mean"))
        return Regression(std, mean)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """mean_c (z_c - y_c)^2."""
        return (logits - labels).square().mean(dim=-1)

    def predictions(self, logits: Tensor) -> Tensor:
        """Give the outputs themselves."""
        return logits

    def divergence(self, target_logits: Tensor, logits: Tensor) -> Tensor:
        """Give the squared error: up to its scale the KL divergence of two normal distributions."""
        return self.squared_error(logits, target_logits)

    def meter(self, outputs: Tensor) -> Meter:
        """Measure the errors in the targets' own units."""
        return _Targets(self, outputs.shape[-1], outputs.device)

    def prediction_columns(self, outputs: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Give the numbers in the targets' own units, float64: [rows], or [rows, targets]."""
        numbers = self._in_own_units(outputs.double().cpu().numpy())
        return {"label": numbers[:, 0] if numbers.shape[1] == 1 else numbers}

    def _in_own_units(self, numbers: Array) -> Array:
        if self.std is not None:
            numbers = numbers * np.array(self.std)
        return numbers if self.mean is None else numbers + np.array(self.mean)

    def row_outcome(self, outputs: Tensor) -> Tensor:
        """Keep the standardised numbers, [rows, targets]."""
        return outputs.float()

    def row_choices(self, table: OutcomeTable, names: Sequence[str]) -> list[RowChoice]:
        """Choose the largest errors of the teacher, and its largest differences to the student.

        Both are root mean squares over the standardised targets.
        """
        errors = _distances(table.teacher, table.labels)
        differences = _distances(table.teacher, table.student)
        return [
            RowChoice("Largest errors of the teacher", errors > 0, errors, IN_ALL),
            RowChoice(
                "Largest differences of teacher and student", differences > 0, differences, IN_ALL
            ),
        ]

    def row_text(self, kept: Array, names: Sequence[str]) -> str:
        """Write the numbers in the targets' own units."""
        numbers = [f"{number:.5g}" for number in self._in_own_units(kept.astype(np.float64))]
        more = [] if len(numbers) <= _MOST_NUMBERS else [f"… ({len(numbers)} numbers)"]
        return ", ".join([*numbers[:_MOST_NUMBERS], *more])

    def example_labels(self, rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn((rows, num_classes), generator=generator)


class RegressionConfig(TaskConfig):
    """A number of each row, or a list of as many in every row."""

    makes = Regression
    name: Literal["regression"] = "regression"


@dataclass(frozen=True, eq=False)
class Scale:
    """The mean and standard deviation of the targets of the labelled rows in use."""

    mean: Float64Array  # [targets]
    std: Float64Array  # [targets], 1 where a target never changes

    @classmethod
    def of(cls, targets: Array) -> Scale:
        """Measure targets [rows, targets]."""
        mean, std = targets.mean(axis=0), targets.std(axis=0)
        still = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)  # only rounding is left
        return cls(mean, np.where(still, 1.0, std))


@dataclass(frozen=True)
class Numbers:
    """One or several numbers of each row: fp32 [rows, targets], standardised."""

    classes: Classes
    scale: Scale | None = None

    @property
    def state(self) -> Mapping[str, Array]:
        """What numbers are standardised by, once that is fitted: mean and std, [targets] each."""
        return {} if self.scale is None else {"mean": self.scale.mean, "std": self.scale.std}

    def check(self, stored: StoredLabels) -> list[str]:
        """Raise DataError unless it holds numbers, or lists of numbers."""
        _check_numbers(stored)
        return []

    def unlabeled(self, stored: StoredLabels) -> BoolArray:
        """Tell which rows have null or NaN, or a list of nothing else."""
        from hpdist.data.sources.labels import is_blank

        return np.fromiter((is_blank(value) for value in stored.values), bool, len(stored.values))

    def encode(self, stored: StoredLabels, rows: RowNumbers) -> Array:
        """Give targets in their own units, float64; NaN where a row that is not used has none."""
        targets = np.full((len(stored.values), len(self.classes)), np.nan)
        used = set(rows)
        for row, value in enumerate(stored.values):
            reason = self._fill(targets[row], value)
            if reason is not None and row in used:
                raise DataError(stored.refusal(row, f": {reason}"))
        return targets

    def _fill(self, out: Array, value: Any) -> str | None:
        if value is None:
            return "it is null"
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) != len(out):
            return f"it has {len(numbers)} numbers, the first labelled row has {len(out)}"
        if any(number is None for number in numbers):
            return "it holds nulls"
        out[:] = numbers
        return None if np.isfinite(out).all() else "it is not finite"

    def class_numbers(self, labels: Any) -> None:
        """Give none: a number is no class."""
        return

    def describe(self, labels: Any, where: str, *, training: bool) -> list[str]:
        """Say nothing: numbers have no classes."""
        return []

    def fitted(self, labels: Any, state: Mapping[str, Array] | None = None) -> Numbers:
        """Give it with the scale of these rows, or with the one that was measured before."""
        scale = Scale.of(labels) if not state else Scale(state["mean"], state["std"])
        return replace(self, scale=scale)

    def finish(self, labels: Any) -> Arrays:
        """Standardise, to fp32; in float64 up to there, so that a large mean costs nothing."""
        assert self.scale is not None
        standardised: Arrays = ((labels - self.scale.mean) / self.scale.std).astype(np.float32)
        return standardised


class _Targets(TorchMetrics):
    """Errors in the targets' own units: the mean over the targets."""

    task: Regression
    of_several_rows = ("r2",)

    def make(self) -> dict[str, Any]:
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

        return {
            "rmse": MeanSquaredError(squared=False, num_outputs=self.classes),
            "mae": MeanAbsoluteError(num_outputs=self.classes),
            "r2": R2Score(multioutput="raw_values"),
        }

    def update(
        self, name: str, metric: Any, predictions: Tensor, labels: Tensor, keep: Tensor
    ) -> None:
        metric.update(predictions[keep], labels[keep])

    def values(self, found: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """R2, which no unit changes, is NaN of a single row."""
        std = torch.tensor(self.task.std or (1.0,) * self.classes, dtype=torch.float64)
        nothing = torch.tensor(float("nan"))
        return {
            "rmse": float((found["rmse"] * std).mean()),
            "mae": float((found["mae"] * std).mean()),
            "r2": float(found.get("r2", nothing).mean()),
        }


def _distances(first: Array, second: Array) -> Array:
    """Give the root mean squares of the differences of standardised numbers, [rows]."""
    distances: Array = np.sqrt(np.square(first - second).mean(axis=1))
    return distances


def _check_numbers(stored: StoredLabels) -> None:
    """Raise DataError unless a column holds numbers, or lists of numbers."""
    from hpdist.data.sources.labels import holds_numbers

    if not holds_numbers(stored.feature):
        raise DataError(
            f"{stored.where}.label: column {stored.column!r} is {stored.feature}; task.name: "
            "regression needs a number, or a list of as many numbers, of every row"
        )
