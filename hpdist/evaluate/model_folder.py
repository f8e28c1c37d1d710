"""The folder of a trained model, which a run ends in: weights, and all that is needed to feed it.

    model/
      hpdist.json           the `Description`: model, task, classes, views, inputs, versions
      model.safetensors     the plain model's parameters and buffers
      fitted.safetensors    what views and labels were measured to be, if anything
      heads.safetensors     the head that predicts, if it is not the model's last layer
      config.json, …        of a model `hf:`, what `transformers` loads it and its tokenizer by

Nothing is pickled, and nothing in the folder is run. It is written under a temporary name and takes
the place of an earlier one when it is whole: whoever is killed leaves the old one or the new one.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpdist.checkpoint.manifest import hash_of, regular_size
from hpdist.data.decode.spec import InputSpec
from hpdist.distributed.fragments import real
from hpdist.distributed.module_names import shortened
from hpdist.errors import CheckpointError, why_not_written
from hpdist.evaluate.description import Description, FileFacts, read_description
from hpdist.evaluate.precision import HALF_DTYPES, keeps_full_precision
from hpdist.models.hf.folder import save_hf_files
from hpdist.models.with_heads import WithHeads

MODEL = "model"
"""The folder's name in a run folder."""
DESCRIPTION = "hpdist.json"
WEIGHTS = "model.safetensors"
FITTED = "fitted.safetensors"
HEADS = "heads.safetensors"

_WRITING, _REPLACED = ".model-writing-", ".model-replaced-"
_EXCHANGE, _HERE = 2, -100  # of Linux's renameat2


def write(
    folder: Path,
    description: Description,
    model: nn.Module,
    spec: InputSpec,
    fitted: Mapping[str, Tensor],
) -> None:
    """Write a plain model, as `plain_model` gives it, into a folder, in place of an earlier one.

    The weights are rounded to `description.weights`, in the model too. Raises CheckpointError where
    that fails; the earlier one is then what it was.
    """
    temporary = folder.parent / f"{_WRITING}{secrets.token_hex(4)}"
    try:
        for left in folder.parent.glob(f"{_WRITING}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, description, model, spec, fitted)
        _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = why_not_written(error, folder.parent)
        raise CheckpointError(f"{folder} could not be written: {why}; make room there") from error


def find(run: Path) -> Path | None:
    """Find the folder of a run's model; None where it has none."""
    folder = run / MODEL
    if (folder / DESCRIPTION).is_file():
        return folder
    left = (path for path in run.glob(f"{_REPLACED}*") if (path / DESCRIPTION).is_file())
    return next(left, None)  # of a process that was killed between two renames


def remove_leftovers(run: Path) -> None:
    """Remove what a process that was killed has left beside the folder of a run's model."""
    kept = find(run)
    for prefix in (_WRITING, _REPLACED):
        for left in run.glob(f"{prefix}*"):
            if left != kept:
                shutil.rmtree(left, ignore_errors=True)


def read(folder: Path) -> Description:
    """Read the description in a model's folder, and verify the files beside it.

    Raises CheckpointError where one is missing or damaged, or the format is a later one.
    """
    file = folder / DESCRIPTION
    if not file.exists():
        raise CheckpointError(f"{folder} is no model that hpdist wrote: it has no {DESCRIPTION}")
    description = read_description(file)
    if WEIGHTS not in description.files:
        raise CheckpointError(f"{file} is not what hpdist writes: it names no {WEIGHTS}")
    for name, facts in description.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name == DESCRIPTION:
            raise CheckpointError(f"{file} names {name!r}, which is not what hpdist writes")
        size = regular_size(folder / name)
        if size != facts.bytes:
            raise CheckpointError(
                f"{folder / name} is truncated or changed: {size} of {facts.bytes} bytes"
            )
        if hash_of(folder / name) != facts.sha256:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 differs")
    return description


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of a file of the folder; none where there is no such file."""
    try:
        return load_file(folder / name) if (folder / name).exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors into the parameters and buffers of their names.

    Raises CheckpointError, which names `where` they are from, unless they are those of the model.
    """
    own = dict(_state(model))
    differ = sorted(own.keys() ^ tensors.keys())
    if differ:
        raise CheckpointError(
            f"{where} does not fit the model: only one of them has {shortened(differ)}"
        )
    for name, tensor in own.items():
        found = tensors[name]
        if real(tensor).shape != found.shape:
            raise CheckpointError(
                f"{where} does not fit the model: {name} is {list(found.shape)} there and "
                f"{list(real(tensor).shape)} in the model"
            )
        real(tensor).copy_(found)


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _write_files(
    folder: Path,
    description: Description,
    model: nn.Module,
    spec: InputSpec,
    fitted: Mapping[str, Tensor],
) -> None:
    half = HALF_DTYPES.get(description.weights)
    if half is not None:
        _round(model, half)
    inner = model.model if isinstance(model, WithHeads) else model
    names, views = description.labels.names, description.views
    if not save_hf_files(inner, folder, names, description.model, views):
        save_tensors(folder / WEIGHTS, _state(inner))
    if isinstance(model, WithHeads):
        save_tensors(folder / HEADS, _state(model.heads))
    if fitted:
        save_tensors(folder / FITTED, fitted.items())
    inputs = description.inputs.model_copy(update={"spec": spec.save_files(folder)})
    for path in folder.rglob("*"):  # safetensors makes its files readable by the owner only
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
    files = {
        path.relative_to(folder).as_posix(): FileFacts(
            bytes=path.stat().st_size, sha256=hash_of(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    heads = description.heads if isinstance(model, WithHeads) else None
    whole = description.model_copy(update={"inputs": inputs, "files": files, "heads": heads})
    (folder / DESCRIPTION).write_text(whole.to_json(), encoding="utf-8")
    for name in [*files, DESCRIPTION]:
        _sync(folder / name)
    _sync(folder)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters to half precision, but for those of normalisations."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.is_floating_point() and not keeps_full_precision(owner):
            parameter.data = parameter.data.to(dtype)


def save_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors by name as safetensors."""
    save_file({name: real(t.detach()).contiguous().cpu().clone() for name, t in tensors}, path)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the folder its name, in one step where the system can exchange two names."""
    if not folder.exists():
        os.rename(temporary, folder)
    elif _exchange(temporary, folder):
        shutil.rmtree(temporary)
    else:
        replaced = folder.parent / f"{_REPLACED}{secrets.token_hex(4)}"
        os.rename(folder, replaced)
        os.rename(temporary, folder)
        shutil.rmtree(replaced)
    for left in folder.parent.glob(f"{_REPLACED}*"):
        shutil.rmtree(left, ignore_errors=True)
    _sync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; False where the system cannot."""
    rename = None
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
