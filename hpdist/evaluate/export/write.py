"""Writes a model as a file of some format, which is kept if it passes the verification."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpdist.config.component import IN_PYTHON
from hpdist.data.sources.labeled import LabeledRows
from hpdist.errors import CheckpointError, ConfigError, why_not_written
from hpdist.evaluate.build import model_of_folder
from hpdist.evaluate.export import (
    executorch_file,
    onnx_file,
    openvino_file,
    safetensors_file,
)
from hpdist.evaluate.export.metadata import unpack
from hpdist.evaluate.export.read import BACKENDS, files_of
from hpdist.evaluate.export.verify import TOLERANCES, Verified, verify
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.model_folder import WEIGHTS
from hpdist.evaluate.precision import cast_weights


@dataclass(frozen=True)
class Format:
    """A kind of file that a model is written as."""

    suffix: str
    """What the name of the file ends in."""
    precisions: tuple[str, ...]
    write: Callable[[LoadedModel, str, Path], None]
    require: Callable[[], object] = lambda: None
    """Raises ConfigError where a package is missing that writing needs."""
    why_not: Mapping[str, str] = field(default_factory=dict)
    """Why it has no other precision, and what to do, by precision."""


FORMATS = {
    "onnx": Format(
        ".onnx",
        onnx_file.PRECISIONS,
        onnx_file.write,
        onnx_file.packages,
        {"bf16": "onnxruntime has no bf16 on a CPU; choose fp16 or fp32, or safetensors"},
    ),
    "safetensors": Format(
        ".safetensors",
        safetensors_file.PRECISIONS,
        safetensors_file.write,
        why_not={"int8": "safetensors holds weights alone; choose onnx, fp16 or bf16"},
    ),
    "openvino": Format(
        ".xml",
        openvino_file.PRECISIONS,
        openvino_file.write,
        openvino_file.require_packages,
        {"int8": "it needs calibration by nncf; choose onnx, or fp16"},
    ),
    "executorch": Format(
        ".pte",
        executorch_file.PRECISIONS,
        executorch_file.write,
        executorch_file.packages,
        {"int8": "it needs calibration by torchao; choose onnx, or fp16"},
    ),
}


def check_export(out: Path, file_format: str | None, precision: str) -> str:
    """Give the format of a file, by default the one that its name ends in. Raises ConfigError."""
    by_suffix = {form.suffix: name for name, form in FORMATS.items()}
    chosen = file_format or by_suffix.get(out.suffix)
    if chosen is None:
        ends = ", ".join(f"{suffix} ({name})" for suffix, name in by_suffix.items())
        raise ConfigError(f"--out: the name of the file, {out.name!r}, ends in none of {ends}")
    if chosen not in FORMATS:
        raise ConfigError(f"--format: {chosen!r} is none of {', '.join(FORMATS)}")
    form = FORMATS[chosen]
    if out.suffix != form.suffix:
        raise ConfigError(
            f"--out: the name of the file must end in {form.suffix}, not in {out.name!r}"
        )
    if precision not in form.precisions:
        why = form.why_not.get(precision, f"choose one of {', '.join(form.precisions)}")
        raise ConfigError(f"--precision: {chosen} has no {precision} here: {why}")
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name a file in it")
    form.require()
    return chosen


def write_file(
    loaded: LoadedModel,
    out: Path,
    rows: LabeledRows,
    *,
    file_format: str | None = None,
    precision: str = "fp32",
    tolerance: float | None = None,
) -> Verified:
    """Write a model to a file and compare that with the model on rows.

    Args:
        loaded: The model, of torch.
        out: The file, which takes the place of an earlier one only if it passes.
        rows: What `open_measured` gave.
        file_format: One of FORMATS; by default the one of what `out` ends in.
        precision: One of those that the format has.
        tolerance: The largest difference of an output, as a share of the largest output; by
            default that of TOLERANCES.

    Raises ConfigError where that cannot be done or the file does not pass, and CheckpointError
    where it cannot be written.
    """
    chosen = check_export(out, file_format, precision)
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    original = loaded.with_precision("fp32", device="cpu")
    temporary = out.with_name(f".{secrets.token_hex(4)}-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[chosen].write(original, precision, temporary)
        found = verify(original, open_file(original, temporary, precision), rows, limit)
        for own, final in zip(files_of(temporary)[::-1], files_of(out)[::-1], strict=True):
            own.chmod(0o666 & ~_umask())
            os.replace(own, final)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {why_not_written(error, out.parent)}"
        ) from error
    finally:
        for own in files_of(temporary):
            own.unlink(missing_ok=True)
    return found


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def open_file(original: LoadedModel, file: Path, precision: str) -> LoadedModel:
    """Give a predictor of an exported file, fed as the model that it was made of."""
    if file.suffix in BACKENDS:
        backend = BACKENDS[file.suffix](file)
        return replace(original, model=None, backend=backend, precision=precision)
    folder = unpack(safetensors_file.read_metadata(file), file)
    (folder / WEIGHTS).symlink_to(file.absolute())
    description = original.description.model_copy(update={"weights": precision})
    given = copy.deepcopy(original.model) if description.model["name"] == IN_PYTHON else None
    model = model_of_folder(folder, description, original.spec, original.views, given)
    return replace(
        original, model=cast_weights(model, precision, original.device), precision=precision
    )
