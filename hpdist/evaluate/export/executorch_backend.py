"""Runs an ExecuTorch file on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdist.data.structures import Structure
from hpdist.errors import CheckpointError, ConfigError, describe
from hpdist.models.outputs import outputs_of

METADATA = "hpdist"
"""The program's method that returns the metadata."""
ROWS = "hpdist.rows"
"""The name in the metadata of the number of rows that a program takes at once."""


class ExecuTorchBackend:
    """A program that `hpdist export` wrote, which takes a limited number of rows at once.

    Raises ConfigError where ExecuTorch is missing, and CheckpointError where it refuses the file.
    """

    name = "executorch"

    def __init__(self, file: Path) -> None:
        try:
            from executorch.runtime import Runtime
        except ImportError as error:
            raise ConfigError(
                f"{file} needs executorch, which is missing; pip install 'hpdist[executorch]'"
            ) from error
        self._bytes = file.stat().st_size
        try:
            self._program: Any = Runtime.get().load_program(file.read_bytes())
            there = METADATA in self._program.method_names
            self._metadata = _read_metadata(self._program) if there else {}
            self._forward: Any = self._program.load_method("forward")
            self._outputs = json.loads(self._metadata.get("hpdist.outputs", "[]"))
            self._inputs = list(json.loads(self._metadata.get("hpdist.inputs", "{}")))
            self._rows = int(self._metadata.get(ROWS, "1"))
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is no file that ExecuTorch runs: {describe(error).splitlines()[0]}"
            ) from error

    @property
    def bytes(self) -> int:
        """The bytes of the file."""
        return self._bytes

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return dict(self._metadata)

    def run(self, rows: Structure) -> Structure:
        """Give the model's outputs for what the views made of rows, on the CPU."""
        given = [rows[name] for name in self._inputs] if isinstance(rows, Mapping) else [rows]
        parts = [tensor.detach().cpu().contiguous().split(self._rows) for tensor in given]
        found = [self._run(part) for part in zip(*parts, strict=True)]
        outputs = [torch.cat(tensors) for tensors in zip(*found, strict=True)]
        return outputs_of(dict(zip(self._outputs, outputs, strict=True)), self._outputs)

    def _run(self, rows: tuple[Tensor, ...]) -> list[Tensor]:
        return [output.clone() for output in self._forward.execute(list(rows))]


def _read_metadata(program: Any) -> dict[str, str]:
    (found,) = program.load_method(METADATA).execute([])
    return {str(k): str(v) for k, v in json.loads(bytes(found.numpy()).decode()).items()}
