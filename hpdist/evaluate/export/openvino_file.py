"""Writes a model for OpenVINO: the graph as NAME.xml, and the weights beside it as NAME.bin.

The graph is that of the ONNX export, which OpenVINO reads. fp16 rounds the weights; computations
are in fp32 on a CPU. The metadata is the file's `rt_info`, and says which weights the graph belongs
to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpdist.checkpoint.manifest import hash_of
from hpdist.errors import ConfigError
from hpdist.evaluate.export.metadata import WEIGHTS_DIGEST, describe_file, feeding_files
from hpdist.evaluate.export.onnx_file import graph, packages
from hpdist.evaluate.export.openvino_backend import openvino
from hpdist.evaluate.export.trace import first_line
from hpdist.evaluate.loaded import LoadedModel

PRECISIONS = ("fp32", "fp16")


def write(loaded: LoadedModel, precision: str, file: Path) -> None:
    """Write a model, in fp32 on the CPU, as an .xml file and a .bin file beside it.

    Raises ConfigError where a package is missing, or the model cannot be traced or converted.
    """
    require_packages()
    proto, shapes = graph(loaded)
    program = openvino("--format openvino")
    try:
        model: Any = program.Core().read_model(proto.SerializeToString())
    except RuntimeError as error:
        raise ConfigError(
            f"--format openvino: OpenVINO cannot read the model: {first_line(error)}; choose onnx"
        ) from error
    values = describe_file(loaded, precision, shapes, feeding_files(loaded))
    half = precision == "fp16"
    program.save_model(model, str(file), compress_to_fp16=half)
    values[WEIGHTS_DIGEST] = hash_of(file.with_suffix(".bin"))
    for name, value in values.items():
        model.set_rt_info(value, [name])
    program.save_model(model, str(file), compress_to_fp16=half)


def require_packages() -> None:
    """Raise ConfigError where a package is missing that writing needs."""
    packages("openvino")
    openvino("--format openvino")
