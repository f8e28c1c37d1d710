"""Writes a model as a file of some format, which is kept if it passes the verification."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpdist.config.component import IN_PYTHON
from hpdist.data.sources.labeled import LabeledRows
from hpdist.errors import CheckpointError, ConfigError, why_not_written
from hpdist.evaluate.build import model_of_folder
from hpdist.evaluate.export import onnx_file, safetensors_file
from hpdist.evaluate.export.metadata import unpack
from hpdist.evaluate.export.onnx_backend import OnnxBackend
from hpdist.evaluate.export.verify import TOLERANCES, Verified, verify
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.model_folder import WEIGHTS
from hpdist.evaluate.precision import cast_weights

FORMATS = {"onnx": onnx_file.PRECISIONS, "safetensors": safetensors_file.PRECISIONS}
"""The precisions of each format; a format's file ends in its name."""

_WRITERS: dict[str, Callable[[LoadedModel, str, Path], None]] = {
    "onnx": onnx_file.write,
    "safetensors": safetensors_file.write,
}
_WHY = {
    ("onnx", "bf16"): "onnxruntime has no bf16 on a CPU; choose fp16 or fp32, or safetensors",
    ("safetensors", "int8"): "safetensors holds weights alone; choose onnx, fp16 or bf16",
}


def check_export(out: Path, file_format: str | None, precision: str) -> str:
    """Give the format of a file, by default the one that its name ends in. Raises ConfigError."""
    chosen = file_format or out.suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise ConfigError(f"--format: {chosen!r} is none of {', '.join(FORMATS)}")
    if out.suffix != f".{chosen}":
        raise ConfigError(f"--out: the name of the file must end in .{chosen}, not in {out.name!r}")
    if precision not in FORMATS[chosen]:
        why = _WHY.get((chosen, precision), f"choose one of {', '.join(FORMATS[chosen])}")
        raise ConfigError(f"--precision: {chosen} has no {precision} here: {why}")
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name a file in it")
    if chosen == "onnx":
        onnx_file.packages()
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
        file_format: One of FORMATS; by default what `out` ends in.
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
        _WRITERS[chosen](original, precision, temporary)
        found = verify(original, open_file(original, temporary, chosen, precision), rows, limit)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {why_not_written(error, out.parent)}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def open_file(original: LoadedModel, file: Path, file_format: str, precision: str) -> LoadedModel:
    """Give a predictor of an exported file, fed as the model that it was made of."""
    if file_format == "onnx":
        backend = OnnxBackend(file)
        return replace(original, model=None, backend=backend, precision=precision)
    folder = unpack(safetensors_file.read_metadata(file), file)
    (folder / WEIGHTS).symlink_to(file.absolute())
    description = original.description.model_copy(update={"weights": precision})
    given = copy.deepcopy(original.model) if description.model["name"] == IN_PYTHON else None
    model = model_of_folder(folder, description, original.spec, original.views, given)
    return replace(
        original, model=cast_weights(model, precision, original.device), precision=precision
    )
