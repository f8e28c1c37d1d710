"""Writes a model for ExecuTorch, which runs it on phones and small devices: fp32 or fp16.

The program computes by XNNPACK where that has the operation, on a CPU. Its memory is planned when
the file is written, so that it takes a limited number of rows at once, and inputs of the length
that the training had. In fp16 weights and computations are in half precision. The metadata is what
the program's method `hpdist` returns, as JSON in UTF-8, uint8 [bytes].
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.errors import ConfigError
from hpdist.evaluate.export.executorch_backend import METADATA, ROWS
from hpdist.evaluate.export.metadata import describe_file, feeding_files
from hpdist.evaluate.export.trace import first_line, positional, quiet, shapes_of
from hpdist.evaluate.loaded import LoadedModel

PRECISIONS = ("fp32", "fp16")
MOST_ROWS = 32
"""Rows that a file takes at once."""


class _Half(nn.Module):
    """Computes in fp16 between inputs and outputs in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = tuple(row.half() if row.is_floating_point() else row for row in rows)
        return tuple(output.float() for output in self.model(given))


def write(loaded: LoadedModel, precision: str, file: Path) -> None:
    """Write a model, in fp32 on the CPU, as an ExecuTorch program.

    Raises ConfigError where the package is missing, or it cannot convert the model.
    """
    lower, partitioner = packages()
    plain, names, given = positional(loaded)
    sizes = [{0: torch.export.Dim("rows", min=1, max=MOST_ROWS)} for _ in given]
    shapes = shapes_of(names, given, sizes)
    values = describe_file(loaded, precision, shapes, feeding_files(loaded))
    text = json.dumps(values | {ROWS: str(MOST_ROWS)}).encode()
    model: nn.Module = _Half(plain) if precision == "fp16" else plain
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(model.eval(), (given,), dynamic_shapes=(tuple(sizes),))
            program: Any = lower(
                exported,
                partitioner=[partitioner()],
                constant_methods={METADATA: torch.frombuffer(bytearray(text), dtype=torch.uint8)},
            ).to_executorch()
    except Exception as error:  # torch's and ExecuTorch's own, of many kinds
        raise ConfigError(
            f"--format executorch: the model cannot be converted: {first_line(error)}; choose onnx"
        ) from error
    file.write_bytes(program.buffer)


def packages() -> tuple[Any, Any]:
    """Import what writing needs. Raises ConfigError where ExecuTorch is missing."""
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ConfigError(
            f"--format executorch needs executorch ({error}); pip install 'hpdist[executorch]'"
        ) from error
    return to_edge_transform_and_lower, XnnpackPartitioner
