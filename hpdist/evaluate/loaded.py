"""A trained model with all that feeds it and reads its outputs: what a `Predictor` is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column
from hpdist.data.kinds import InputKind
from hpdist.data.sources.label_encoding import Encoding
from hpdist.data.structures import Structure, as_dtype, cat, to
from hpdist.data.views.base import Views
from hpdist.errors import ConfigError
from hpdist.evaluate.description import Description
from hpdist.evaluate.forward_rows import forward_in_parts
from hpdist.evaluate.precision import cast_weights, computing, weight_bytes
from hpdist.evaluate.rows import value_batches
from hpdist.models.outputs import outputs_of
from hpdist.tasks.base import Task

_PROBABILITIES = "probabilities"


class Backend(Protocol):
    """Runs a model that is not one of torch, such as an exported file."""

    name: str

    def run(self, rows: Structure) -> Structure:
        """Give the model's outputs for what the views made of rows, on the CPU."""
        ...

    @property
    def bytes(self) -> int:
        """The bytes of its weights, or of its file."""
        ...


@dataclass
class LoadedModel:
    """A trained model, and all that is needed to feed it and to read its outputs.

    Its attributes may be read; a method that changes one gives a new predictor.
    """

    model: nn.Module | None
    """A plain module of torch, in evaluation mode, without hooks and heads; None of a file that
    another program runs."""
    task: Task
    names: tuple[str, ...]
    """The classes, or the targets."""
    kind: InputKind
    """What finds the column of inputs."""
    spec: InputSpec
    """How stored values are decoded."""
    column: Column
    """The column, or columns, of the inputs in the labelled set."""
    views: Views
    encoding: Encoding | None
    """How labels are read; None of a task that must see a set's labels for that."""
    precision: str
    device: torch.device
    source: Path
    description: Description
    fitted: Mapping[str, Tensor] = field(default_factory=dict)
    """What views and labels were measured to be."""
    backend: Backend | None = None

    @property
    def run_id(self) -> str:
        """The id of the run that trained the model."""
        return self.description.run.id

    @property
    def step(self) -> int | None:
        """The step of the run that the weights are of."""
        return self.description.step

    @property
    def bytes(self) -> int:
        """The bytes of the weights and buffers, or of the file that another program runs."""
        if self.backend is not None:
            return self.backend.bytes
        return weight_bytes(self._module, self.precision)

    @property
    def _module(self) -> nn.Module:
        if self.model is None:
            raise ConfigError(
                f"{self.source} is an exported file, which has no module of torch; load the run's "
                "model/ folder"
            )
        return self.model

    def outputs(self, inputs: Structure) -> Structure:
        """Give the outputs of the task for decoded rows, as batches have them.

        Inputs are one tensor or tensors by name, [rows, *], on any device. The result is fp32 on
        the predictor's device: the logits as one tensor, or tensors by name where the task goes by
        more. Communicates nothing.
        """
        rows = self.views.plain(to(inputs, self.device, non_blocking=True))
        if self.backend is not None:
            return as_dtype(self.backend.run(rows), torch.float32)
        with computing(self.precision, self.device):
            if self.device.type == "cpu":
                return forward_in_parts(self._forward, rows)
            return self._forward(rows)

    def _forward(self, rows: Structure) -> Structure:
        """Give the outputs of what the model itself takes, fp32."""
        return as_dtype(outputs_of(self._module(rows), self.task.outputs), torch.float32)

    def columns(self, outputs: Structure) -> dict[str, Any]:
        """Give what the task says of outputs, as `Task.prediction_columns` does."""
        return self.task.prediction_columns(outputs, self.names)

    def predict_columns(self, data: Any, *, batch: int | None = None) -> dict[str, Any]:
        """Predict all rows; give columns by name, each a list or an array of as many rows.

        `label` is among them; classification also has `confidence` and `probabilities`.

        Args:
            data: A path, settings of a `data` section, a `datasets.Dataset`, a `DataFrame`, a list
                of rows (dicts), or the inputs themselves: an array or tensor [rows, *], or a list
                of stored values.
            batch: Rows of a forward; by default as many as the run's evaluation had.

        Raises DataError where the column is missing, or a row cannot be decoded.
        """
        found: dict[str, list[Any]] = {}
        for outputs in self._predicted(data, batch):
            for name, values in self.columns(outputs).items():
                found.setdefault(name, []).append(values)
        return {name: _joined(parts) for name, parts in found.items()}

    def predict(self, data: Any, *, batch: int | None = None) -> list[Any]:
        """Give the label of each row: a class by its name, names of classes, or numbers.

        Takes what `predict_columns` takes, and raises as it does.
        """
        labels = self.predict_columns(data, batch=batch).get("label", [])
        return list(labels.tolist() if isinstance(labels, np.ndarray) else labels)

    def predict_probabilities(self, data: Any, *, batch: int | None = None) -> Any:
        """Give the probability of every class, float32 [rows, classes], in the order of `names`.

        Takes what `predict_columns` takes. Raises ConfigError where the task has no probabilities.
        """
        found = self.predict_columns(data, batch=batch)
        if found and _PROBABILITIES not in found:
            raise ConfigError(
                f"task.name: {self.task.name} has no probabilities; predict_columns gives "
                f"{', '.join(found)}"
            )
        return found.get(_PROBABILITIES, np.zeros((0, len(self.names)), np.float32))

    def raw_outputs(self, data: Any, *, batch: int | None = None) -> Structure:
        """Give the outputs of all rows, fp32 on the CPU; takes what `predict_columns` takes."""
        return cat([to(outputs, "cpu") for outputs in self._predicted(data, batch)])

    def _predicted(self, data: Any, batch: int | None) -> Iterator[Structure]:
        size = batch or self.description.batch
        for values, ids, name, describe in value_batches(data, self.kind, self.column, size):
            rows = self.spec.decode_rows(values, ids, name, describe)
            yield self.outputs(rows)

    def with_precision(self, precision: str, *, device: str | torch.device | None = None) -> Self:
        """Give another predictor of the same weights in a precision, with a copy of the model.

        Weights that were rounded once stay rounded. Raises ConfigError for an unknown precision.
        """
        place = self.device if device is None else torch.device(device)
        model = cast_weights(copy.deepcopy(self._module), precision, place)
        return replace(self, model=model, precision=precision, device=place)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]
