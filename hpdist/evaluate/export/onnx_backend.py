"""Runs an ONNX file by onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpdist.data.structures import Structure
from hpdist.errors import CheckpointError, ConfigError, describe
from hpdist.models.outputs import outputs_of


class OnnxBackend:
    """A session of onnxruntime on a file that `hpdist export` wrote.

    Raises ConfigError where onnxruntime is missing, and CheckpointError where it refuses the file.
    """

    name = "onnxruntime"

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(
                f"{file} needs onnxruntime, which is missing; pip install 'hpdist[export]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        options.intra_op_num_threads = torch.get_num_threads()  # ranks share the cores
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own, of many kinds
            raise CheckpointError(
                f"{file} is no ONNX file that onnxruntime runs: {describe(error).splitlines()[0]}"
            ) from error
        self._bytes = file.stat().st_size
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._outputs = [each.name for each in self._session.get_outputs()]

    @property
    def bytes(self) -> int:
        """The bytes of the file."""
        return self._bytes

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, rows: Structure) -> Structure:
        """Give the model's outputs for what the views made of rows, on the CPU."""
        named = rows if isinstance(rows, Mapping) else {self._inputs[0]: rows}
        given = {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}
        found = [torch.from_numpy(array) for array in self._session.run(self._outputs, given)]
        return outputs_of(dict(zip(self._outputs, found, strict=True)), self._outputs)
