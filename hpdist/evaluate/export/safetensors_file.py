"""Writes a model as one safetensors file: weights, with all else in the file's metadata."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hpdist.data.structures import Structure, tensors_of
from hpdist.errors import CheckpointError
from hpdist.evaluate import model_folder
from hpdist.evaluate.export.metadata import (
    WEIGHTS_DIGEST,
    describe_file,
    input_names,
    read_files,
)
from hpdist.evaluate.loaded import LoadedModel

PRECISIONS = ("fp32", "bf16", "fp16")


def write(loaded: LoadedModel, precision: str, file: Path) -> None:
    """Write a model, in fp32 on the CPU, with its weights in a precision.

    The names of the tensors are those of `model/model.safetensors`; the weights of normalisations
    and the buffers stay in fp32.
    """
    rows: Structure = loaded.views.plain(loaded.spec.example(2))
    shapes = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [None, *tensor.shape[1:]],
        }
        for name, tensor in zip(input_names(rows), tensors_of(rows), strict=True)
    }
    description = loaded.description.model_copy(update={"weights": precision})
    with tempfile.TemporaryDirectory(prefix="hpdist-export-", dir=file.parent) as name:
        folder = Path(name) / model_folder.MODEL
        assert loaded.model is not None
        model = copy.deepcopy(loaded.model)
        model_folder.write(folder, description, model, loaded.spec, loaded.fitted)
        values = describe_file(loaded, precision, shapes, read_files(folder))
        values[WEIGHTS_DIGEST] = _hash_of_tensors(folder / model_folder.WEIGHTS)
        tensors = load_file(folder / model_folder.WEIGHTS)
    save_file(tensors, file, {**values, "format": "pt"})


def read_metadata(file: Path) -> dict[str, str]:
    """Read what a file says of itself, and verify its weights by that.

    Raises CheckpointError where it is no safetensors file, or its weights are damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            found = dict(opened.metadata() or {})
        expected = found.get(WEIGHTS_DIGEST)
        if expected is not None and _hash_of_tensors(file) != expected:
            raise CheckpointError(
                f"{file} is damaged: the SHA-256 of its weights differs; export the run again"
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    return found


def _hash_of_tensors(file: Path) -> str:
    """Give the SHA-256 of all that follows the header, which does not depend on the metadata."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(int.from_bytes(opened.read(8), "little"), os.SEEK_CUR)
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
