"""Opens a file that `hpdist export` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpdist.errors import CheckpointError
from hpdist.evaluate.export.executorch_backend import ExecuTorchBackend
from hpdist.evaluate.export.metadata import MODEL, PRECISION, unpack
from hpdist.evaluate.export.onnx_backend import OnnxBackend
from hpdist.evaluate.export.openvino_backend import OpenVinoBackend
from hpdist.evaluate.export.safetensors_file import read_metadata
from hpdist.evaluate.model_folder import WEIGHTS

FileBackend = OnnxBackend | OpenVinoBackend | ExecuTorchBackend

BACKENDS: dict[str, Callable[[Path], FileBackend]] = {
    ".onnx": OnnxBackend,
    ".xml": OpenVinoBackend,
    ".pte": ExecuTorchBackend,
}
"""What runs a file, by the end of its name; safetensors have weights alone, for torch."""


def files_of(file: Path) -> list[Path]:
    """List what an exported file consists of: itself, and the weights beside it of OpenVINO."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def open_exported(file: Path) -> tuple[Path, str, FileBackend | None]:
    """Open an exported file by the end of its name.

    Gives a folder with the description and what is beside it, the file's precision, and what runs
    the file, which is None where the folder also has weights. Raises CheckpointError where it is
    no such file, and ConfigError where a package is missing.
    """
    backend = None
    if file.suffix in BACKENDS:
        backend = BACKENDS[file.suffix](file)
        metadata = backend.metadata
    elif file.suffix == ".safetensors":
        metadata = read_metadata(file)
    else:
        raise CheckpointError(
            f"{file} is a file whose name ends in none of {', '.join(BACKENDS)} and .safetensors; "
            "name a run folder, its model/, a checkpoint, or what hpdist export wrote"
        )
    if MODEL not in metadata:
        raise CheckpointError(
            f"{file} was not written by hpdist export: it says nothing of how it is fed; name a "
            "run folder, its model/, or what hpdist export wrote"
        )
    folder = unpack(metadata, file)
    if backend is None:
        (folder / WEIGHTS).symlink_to(file.absolute())
    return folder, metadata.get(PRECISION, "fp32"), backend
