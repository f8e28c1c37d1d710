"""A trained model with all that turns inputs in memory into its outputs; it can be pickled."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column, stored_inputs
from hpdist.data.sources.arrays import array_table
from hpdist.data.structures import narrow
from hpdist.data.views import Views
from hpdist.models.mlp import MLP
from hpdist.tasks.base import Task
from hpdist.train.loop import RunLoop

_ROWS = 1024  # that are computed at once


@dataclass(frozen=True)
class FittedModel:
    """A plain model, and how its inputs are read."""

    model: nn.Module
    column: Column
    spec: InputSpec
    views: Views
    task: Task
    exact: bool
    """Whether it computes in float64, so that a row's outputs do not depend on its batch."""

    @classmethod
    def of(cls, loop: RunLoop, model: nn.Module) -> FittedModel:
        """Take a run's model, and what the run knows of its inputs."""
        data = loop.data
        exact = isinstance(model, MLP)
        own = copy.deepcopy(model).double() if exact else model
        return cls(own, data.labeled.column, data.spec, data.views, data.task, exact)

    @torch.no_grad()
    def outputs(self, inputs: Any) -> Tensor:
        """Compute the outputs of rows, given as when it was fitted; on the CPU.

        Raises DataError where a row cannot be read.
        """
        table = array_table("X", inputs)
        values = stored_inputs(table.with_format("arrow")[:], self.column)
        rows = self.spec.decode_rows(values, range(len(values)), "X")
        found = []
        for start in range(0, len(values), _ROWS):
            part = narrow(rows, start, min(_ROWS, len(values) - start))
            part = self.views.plain(part)
            found.append(self.model(part.double() if self.exact else part))
        outputs = torch.cat([getattr(output, "logits", output) for output in found])
        return outputs if self.exact else outputs.float()
