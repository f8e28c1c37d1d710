"""What an exported file says of itself: strings by name, alike in every format.

    hpdist                the `Description` of the model, as JSON
    hpdist.files          what decoding and views need beside it: base64 by path, as JSON
    hpdist.precision      fp32, bf16, fp16 or int8
    hpdist.task           the task's name
    hpdist.names          the classes, or the targets, as a JSON list
    hpdist.inputs         dtype and shape of each input by name, as JSON; null is any number
    hpdist.outputs        the outputs' names, as a JSON list
    hpdist.normalization  of pictures: mean and deviation of each channel, for pixels from 0 to 1
    hpdist.rows           of ExecuTorch: the number of rows that the file takes at once
    hpdist.weights        of OpenVINO: the SHA-256 of the file with the weights; of safetensors: of
                          all that follows the header

A program without hpdist reads those from the precision on. Nothing here is code, and reading runs
none.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hpdist.data.structures import Structure, tensors_of
from hpdist.errors import CheckpointError, describe
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.model_folder import DESCRIPTION, FITTED, WEIGHTS, save_tensors
from hpdist.models.hf.folder import save_hf_config
from hpdist.models.with_heads import WithHeads

MODEL, FILES, PRECISION = "hpdist", "hpdist.files", "hpdist.precision"
WEIGHTS_DIGEST = "hpdist.weights"
INPUT = "input"
"""The name of the input of a model that takes one tensor."""

_UNPACKED: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def input_names(rows: Structure) -> list[str]:
    """Name the inputs of a model that takes these rows."""
    return list(rows) if isinstance(rows, Mapping) else [INPUT]


def describe_file(
    loaded: LoadedModel, precision: str, shapes: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, str]:
    """Give the metadata of a file.

    Args:
        loaded: The model.
        precision: That of the file.
        shapes: Dtype and shape of each input by name.
        files: What `feeding_files` or a model's folder has, by path.
    """
    spec = json.loads(files[DESCRIPTION])
    spec["files"] = {}
    found = {
        MODEL: json.dumps(spec),
        FILES: json.dumps(
            {n: base64.b64encode(b).decode() for n, b in files.items() if n != DESCRIPTION}
        ),
        PRECISION: precision,
        "hpdist.task": loaded.task.name,
        "hpdist.names": json.dumps(list(loaded.names)),
        "hpdist.inputs": json.dumps(shapes),
        "hpdist.outputs": json.dumps(list(loaded.task.outputs)),
    }
    normalization = _normalization(loaded)
    if normalization is not None:
        found["hpdist.normalization"] = json.dumps(normalization)
    return found


def _normalization(loaded: LoadedModel) -> dict[str, list[float]] | None:
    """Read off the views what they subtract and divide pixels by; None of other inputs."""
    if loaded.spec.kind != "image" or loaded.description.views.get("name") != "image":
        return None
    section: Any = loaded.description.section("views")
    mean, std = section.mean or [0.5], section.std or [0.25]
    channels = next(tensors_of(loaded.spec.example(1))).shape[1]

    def each(values: list[float]) -> list[float]:
        return list(values) * channels if len(values) == 1 else list(values)

    return {"mean": each(mean), "std": each(std)}


def feeding_files(loaded: LoadedModel) -> dict[str, bytes]:
    """Give the description and what feeding the model needs, by path: no weights are there."""
    with tempfile.TemporaryDirectory(prefix="hpdist-export-") as name:
        folder = Path(name)
        spec = loaded.spec.save_files(folder)
        model = loaded.model.model if isinstance(loaded.model, WithHeads) else loaded.model
        if model is not None:
            save_hf_config(model, folder)
        inputs = loaded.description.inputs.model_copy(update={"spec": spec})
        whole = loaded.description.model_copy(
            update={"inputs": inputs, "files": {}, "heads": None, "weights": "fp32"}
        )
        (folder / DESCRIPTION).write_text(whole.to_json(), encoding="utf-8")
        if loaded.fitted:
            save_tensors(folder / FITTED, loaded.fitted.items())
        return read_files(folder)


def read_files(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder but the weights, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != WEIGHTS
    }


def unpack(metadata: Mapping[str, str], file: Path) -> Path:
    """Write what a file's metadata holds into a folder, which is there until the process ends.

    Raises CheckpointError where the metadata is not what hpdist writes.
    """
    try:
        files = json.loads(metadata[FILES])
        contents = {name: base64.b64decode(text, validate=True) for name, text in files.items()}
        contents[DESCRIPTION] = metadata[MODEL].encode()
    except (KeyError, ValueError, TypeError, AttributeError, binascii.Error) as error:
        raise CheckpointError(
            f"{file} is not what hpdist export writes: its metadata cannot be read "
            f"({describe(error)}); export the run again"
        ) from error
    wrong = [name for name in contents if not _stays_inside(name)]
    if wrong:
        raise CheckpointError(f"{file} is not what hpdist export writes: it names {wrong[0]!r}")
    held = tempfile.TemporaryDirectory(prefix="hpdist-exported-")
    _UNPACKED.append(held)
    folder = Path(held.name)
    for name, content in contents.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    parts = path.parts
    return bool(parts) and not path.is_absolute() and ".." not in parts and "\\" not in name
