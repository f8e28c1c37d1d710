"""Runs an OpenVINO file on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpdist.checkpoint.manifest import hash_of
from hpdist.data.structures import Structure
from hpdist.errors import CheckpointError, ConfigError
from hpdist.evaluate.export.metadata import WEIGHTS_DIGEST
from hpdist.models.outputs import outputs_of

_TELEMETRY = "openvino_telemetry"


def openvino(what: str) -> Any:
    """Import OpenVINO for a format or a file. Raises ConfigError where it is missing.

    OpenVINO reports its own import to its makers; here it is imported so that it does not.
    """
    try:
        with _without_telemetry():
            import openvino
    except ImportError as error:
        raise ConfigError(
            f"{what} needs openvino, which is missing; pip install 'hpdist[openvino]'"
        ) from error
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Inside, its telemetry cannot be imported, and OpenVINO takes a stub that does nothing."""
    if _TELEMETRY in sys.modules:  # someone else has imported it
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(_TELEMETRY, None)


class OpenVinoBackend:
    """A compiled model of an .xml file that `hpdist export` wrote, and of the .bin beside it.

    It computes in fp32, whatever the processor has. Raises ConfigError where OpenVINO is missing,
    and CheckpointError where it refuses the file or the weights are those of another one.
    """

    name = "openvino"

    def __init__(self, file: Path) -> None:
        core = openvino(str(file)).Core()
        weights = file.with_suffix(".bin")
        if not weights.is_file():
            raise CheckpointError(f"{file} needs its weights beside it: there is no {weights.name}")
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            model = core.read_model(str(file))
            self._metadata = _metadata(model)
            self._compiled: Any = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            why = [line for line in str(error).splitlines() if line.strip()]
            raise CheckpointError(f"{file} is no file that OpenVINO runs: {why[-1]}") from error
        expected = self._metadata.get(WEIGHTS_DIGEST)
        if expected is not None and hash_of(weights) != expected:
            raise CheckpointError(
                f"{weights} has other weights than {file.name} was written with; export the run "
                "again"
            )
        self._bytes = file.stat().st_size + weights.stat().st_size
        self._inputs = [each.any_name for each in self._compiled.inputs]
        self._outputs = [each.any_name for each in self._compiled.outputs]

    @property
    def bytes(self) -> int:
        """The bytes of both files."""
        return self._bytes

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return dict(self._metadata)

    def run(self, rows: Structure) -> Structure:
        """Give the model's outputs for what the views made of rows, on the CPU."""
        named = rows if isinstance(rows, Mapping) else {self._inputs[0]: rows}
        found = self._compiled({name: t.detach().cpu().numpy() for name, t in named.items()})
        outputs = [torch.from_numpy(found[place].copy()) for place in self._compiled.outputs]
        return outputs_of(dict(zip(self._outputs, outputs, strict=True)), self._outputs)


def _metadata(model: Any) -> dict[str, str]:
    return {
        name: str(value.astype(str))
        for name, value in model.rt_info.items()
        if name.partition(".")[0] == "hpdist"
    }
